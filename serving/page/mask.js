// Painting where the picture may change: strokes with undo, by pointer or keyboard, and the mask that the API takes.

const MAX_CANVAS_PX = 2048; // what is shown need not be finer; the mask that is sent has the picture's own size

export class MaskPainter {
  #canvas;
  #ring;
  #onChange;
  #size = { width: 1, height: 1 }; // of the picture; strokes and brush are in its pixels
  #strokes = [];
  #stroke = null; // the one being drawn
  #at = { x: 0, y: 0 }; // of the brush
  #brushPercent = 12;
  isErasing = false;

  constructor(canvas, ring, onChange) {
    this.#canvas = canvas;
    this.#ring = ring;
    this.#onChange = onChange;
    canvas.addEventListener("pointerdown", (event) => this.#onDown(event));
    canvas.addEventListener("pointermove", (event) => this.#onMove(event));
    for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, () => (this.#stroke = null));
    canvas.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Begins a mask for a picture; the old one is forgotten. */
  reset({ width, height }) {
    this.#size = { width, height };
    const scale = Math.min(1, MAX_CANVAS_PX / Math.max(width, height));
    this.#canvas.width = Math.max(1, Math.round(width * scale));
    this.#canvas.height = Math.max(1, Math.round(height * scale));
    this.#at = { x: width / 2, y: height / 2 };
    this.#placeRing();
    this.clear();
  }

  get isEmpty() {
    return !this.#strokes.some(({ erases }) => !erases);
  }

  /** Diameter of the brush in percent of the shorter side. */
  set brushPercent(percent) {
    this.#brushPercent = percent;
    this.#placeRing();
  }

  undo() {
    this.#strokes.pop();
    this.#draw();
  }

  clear() {
    this.#strokes = [];
    this.#draw();
  }

  /** A PNG of the picture's size, transparent where it was painted; null if nothing was. */
  async png() {
    if (this.isEmpty) return null;
    const painted = Object.assign(document.createElement("canvas"), this.#size);
    this.#paint(painted, this.#strokes);
    const mask = Object.assign(document.createElement("canvas"), this.#size);
    const pen = mask.getContext("2d");
    pen.fillRect(0, 0, mask.width, mask.height);
    pen.globalCompositeOperation = "destination-out";
    pen.drawImage(painted, 0, 0);
    return new Promise((done) => mask.toBlob(done, "image/png"));
  }

  get #brushPx() {
    return Math.max(1, (Math.min(this.#size.width, this.#size.height) * this.#brushPercent) / 100);
  }

  #draw() {
    this.#canvas.getContext("2d").clearRect(0, 0, this.#canvas.width, this.#canvas.height);
    this.#paint(this.#canvas, this.#strokes);
    this.#onChange();
  }

  #paint(canvas, strokes) {
    const pen = canvas.getContext("2d");
    pen.save();
    pen.scale(canvas.width / this.#size.width, canvas.height / this.#size.height);
    Object.assign(pen, { lineCap: "round", lineJoin: "round", strokeStyle: "#e0218a" });
    for (const { points, widthPx, erases } of strokes) {
      pen.globalCompositeOperation = erases ? "destination-out" : "source-over";
      pen.lineWidth = widthPx;
      pen.beginPath();
      pen.moveTo(points[0].x, points[0].y);
      pen.lineTo(points[0].x + 0.01, points[0].y); // a dab: of a line of no length at all nothing is drawn
      for (const { x, y } of points) pen.lineTo(x, y);
      pen.stroke();
    }
    pen.restore();
  }

  #begin() {
    this.#stroke = { points: [this.#at], widthPx: this.#brushPx, erases: this.isErasing };
    this.#strokes.push(this.#stroke);
    this.#paint(this.#canvas, [this.#stroke]);
    this.#onChange();
  }

  #onDown(event) {
    if (event.button > 0 || !event.isPrimary) return;
    event.stopPropagation(); // the viewer would pan
    this.#canvas.setPointerCapture(event.pointerId);
    this.#follow(event);
    this.#begin();
  }

  #onMove(event) {
    if (!event.isPrimary) return;
    const last = this.#at;
    this.#follow(event);
    if (!this.#stroke) return;
    this.#stroke.points.push(this.#at);
    this.#paint(this.#canvas, [{ ...this.#stroke, points: [last, this.#at] }]);
  }

  #follow({ clientX, clientY }) {
    const box = this.#canvas.getBoundingClientRect();
    this.#at = {
      x: ((clientX - box.left) / box.width) * this.#size.width,
      y: ((clientY - box.top) / box.height) * this.#size.height,
    };
    this.#placeRing();
  }

  #placeRing() {
    const { style } = this.#ring;
    style.left = `${(this.#at.x / this.#size.width) * 100}%`;
    style.top = `${(this.#at.y / this.#size.height) * 100}%`;
    style.width = `${(this.#brushPx / this.#size.width) * 100}%`;
  }

  #onKey(event) {
    const step = this.#brushPx / 2;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (moves[event.key]) {
      const [x, y] = moves[event.key];
      const within = (value, most) => Math.min(most, Math.max(0, value));
      this.#at = { x: within(this.#at.x + x, this.#size.width), y: within(this.#at.y + y, this.#size.height) };
      this.#placeRing();
    } else if (event.key === " ") {
      this.#begin();
      this.#stroke = null;
    } else if (event.key.toLowerCase() === "z" && (event.ctrlKey || event.metaKey)) {
      this.undo();
    } else return;
    event.preventDefault();
  }
}
