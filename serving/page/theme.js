// Light or dark as the reader chose, else as their system says. No module: it runs before the first paint.
(() => {
  const remembered = () => {
    try {
      return localStorage.getItem("mgie.theme");
    } catch {
      return null; // storage is switched off: the choice lasts as long as the page
    }
  };
  const apply = (theme) => document.documentElement.style.setProperty("color-scheme", theme);
  if (remembered()) apply(remembered());
  addEventListener("DOMContentLoaded", () => {
    document.getElementById("theme").addEventListener("click", () => {
      const now = getComputedStyle(document.documentElement).colorScheme;
      const isDark = now.includes("light") && now.includes("dark")
        ? matchMedia("(prefers-color-scheme: dark)").matches
        : now === "dark";
      const theme = isDark ? "light" : "dark";
      apply(theme);
      try {
        localStorage.setItem("mgie.theme", theme);
      } catch {
        // As above.
      }
    });
  });
})();
