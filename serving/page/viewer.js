// Two pictures of one size, one over the other: a border to drag between them, zoom to the last pixel, panning.

const MAX_ZOOM = 32;
const GRAB_PX = 28; // so near the border a drag moves it, also where the picture is zoomed

export class Viewer {
  #root;
  #before;
  #after;
  #split;
  #onZoom;
  #size = { width: 1, height: 1 };
  #zoom = 1; // 1: the whole picture fills the box
  #x = 0; // of the picture's corner in the box, CSS pixels
  #y = 0;
  #pointers = new Map();
  #isSliding = false;

  /**
   * @param root - holds #before, #after and the range #split
   * @param onZoom - told how many screen pixels show one pixel of the picture, and whether it fills the box
   */
  constructor(root, onZoom) {
    this.#root = root;
    [this.#before, this.#after, this.#split] = ["#before", "#after", "#split"].map((id) => root.querySelector(id));
    this.#onZoom = onZoom;
    this.#split.addEventListener("input", () => this.#place());
    this.#split.addEventListener("keydown", (event) => this.#onKey(event));
    root.addEventListener("pointerdown", (event) => this.#onDown(event));
    root.addEventListener("pointermove", (event) => this.#onMove(event));
    for (const kind of ["pointerup", "pointercancel"]) {
      root.addEventListener(kind, ({ pointerId }) => this.#pointers.delete(pointerId));
    }
    root.addEventListener("wheel", (event) => this.#onWheel(event), { passive: false });
    root.addEventListener("dblclick", (event) => (this.#zoom === 1 ? this.full(event) : this.fit()));
    new ResizeObserver(() => this.#place()).observe(root);
  }

  /**
   * @param before - address of the left picture; null: only `after` is shown
   * @param after - of the right one
   * @param name - what they show, for those who cannot see them
   */
  show({ before, after, width, height, name }) {
    if (width !== this.#size.width || height !== this.#size.height) {
      this.#size = { width, height };
      this.#root.style.setProperty("--ratio", width / height);
      this.fit();
    }
    setSource(this.#before, before);
    setSource(this.#after, after);
    this.#before.alt = before ? `${name}: before` : "";
    this.#after.alt = before ? `${name}: after` : name;
    this.#root.classList.toggle("is-split", Boolean(before && after));
    this.#place();
  }

  fit() {
    this.#zoom = 1;
    this.#place();
  }

  full(at) {
    this.#zoomTo(this.#fullZoom, at);
  }

  zoomBy(factor, at) {
    this.#zoomTo(this.#zoom * factor, at);
  }

  get #fullZoom() {
    return this.#size.width / devicePixelRatio / this.#root.clientWidth;
  }

  #zoomTo(zoom, at) {
    const box = this.#root.getBoundingClientRect();
    const x = at ? at.clientX - box.left : box.width / 2;
    const y = at ? at.clientY - box.top : box.height / 2;
    const next = Math.min(Math.max(zoom, Math.min(1, this.#fullZoom)), Math.max(MAX_ZOOM, this.#fullZoom));
    // What lies at (x, y) stays there.
    this.#x = x - ((x - this.#x) * next) / this.#zoom;
    this.#y = y - ((y - this.#y) * next) / this.#zoom;
    this.#zoom = next;
    this.#place();
  }

  #place() {
    const { clientWidth: width, clientHeight: height } = this.#root;
    if (!width) return; // hidden
    const within = (at, side) => {
      const slack = side * (1 - this.#zoom);
      return slack > 0 ? slack / 2 : Math.min(0, Math.max(slack, at));
    };
    this.#x = within(this.#x, width);
    this.#y = within(this.#y, height);
    const { style } = this.#root;
    style.setProperty("--zoom", this.#zoom);
    style.setProperty("--x", `${this.#x}px`);
    style.setProperty("--y", `${this.#y}px`);
    style.setProperty("--split", `${this.#split.value}%`);
    this.#root.classList.toggle("is-zoomed", this.#zoom > 1);
    this.#onZoom(this.#zoom / this.#fullZoom, this.#zoom === 1);
  }

  #moveBy(x, y) {
    this.#x += x;
    this.#y += y;
    this.#place();
  }

  #slideTo({ clientX }) {
    const { left, width } = this.#root.getBoundingClientRect();
    this.#split.value = ((clientX - left) / width) * 100;
    this.#place();
  }

  #onDown(event) {
    if (event.button > 0) return;
    this.#root.setPointerCapture(event.pointerId);
    this.#pointers.set(event.pointerId, event);
    const { left, width } = this.#root.getBoundingClientRect();
    const isNear = Math.abs(event.clientX - left - (width * this.#split.value) / 100) < GRAB_PX;
    this.#isSliding = this.#root.classList.contains("is-split") && (isNear || this.#zoom <= 1);
    if (this.#isSliding && this.#pointers.size === 1) this.#slideTo(event);
  }

  #onMove(event) {
    const last = this.#pointers.get(event.pointerId);
    if (!last) return;
    this.#pointers.set(event.pointerId, event);
    const other = [...this.#pointers.values()].find(({ pointerId }) => pointerId !== event.pointerId);
    if (other) {
      const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      const middle = { clientX: (event.clientX + other.clientX) / 2, clientY: (event.clientY + other.clientY) / 2 };
      if (apart(last) > 0) this.zoomBy(apart(event) / apart(last), middle);
    } else if (this.#isSliding) {
      this.#slideTo(event);
    } else {
      this.#moveBy(event.clientX - last.clientX, event.clientY - last.clientY);
    }
  }

  #onWheel(event) {
    if (!event.ctrlKey && this.#zoom === 1) return; // the page scrolls
    event.preventDefault();
    this.zoomBy(Math.exp(-event.deltaY / 300), event);
  }

  #onKey(event) {
    const step = 40;
    const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
    if (event.key === "+" || event.key === "=") this.zoomBy(1.25);
    else if (event.key === "-") this.zoomBy(0.8);
    else if (event.key === "0") this.fit();
    else if (event.shiftKey && moves[event.key]) this.#moveBy(...moves[event.key]);
    else return;
    event.preventDefault();
  }
}

function setSource(image, url) {
  image.hidden = !url;
  if (!url) image.removeAttribute("src");
  else if (image.getAttribute("src") !== url) image.src = url;
}
