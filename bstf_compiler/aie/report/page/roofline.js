// Rooflines: effective operations/s over operations a byte, under what cores and links can do at most.
class Roofline {
  constructor(svg) {
    this.svg = svg;
    this.level = "DDR";
    document.querySelectorAll("input[name=level]").forEach(input => input.addEventListener("change", () => {
      this.level = input.value;
      this.width = 0;
      this.draw();
    }));
    svg.addEventListener("keydown", e => {
      const by_ = {ArrowRight: 1, ArrowDown: 1, n: 1, ArrowLeft: -1, ArrowUp: -1, p: -1}[e.key];
      if (!by_) return;
      e.preventDefault();
      step(by_);
    });
  }
  add(name, attributes, words = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = words;
    this.svg.append(made);
    return made;
  }
  draw() {
    if (this.width === this.svg.clientWidth) return;  // time and cursor change nothing here
    this.width = this.svg.clientWidth;
    this.height = Math.max(260, Math.min(420, this.width * .5));
    this.svg.setAttribute("viewBox", `0 0 ${this.width} ${this.height}`);
    this.svg.style.height = this.height + "px";
    this.svg.replaceChildren();
    const {peak, [this.level]: rate} = data.roofs, column = this.level === "DDR" ? 3 : 4;
    this.points = panels.flatMap((panel, i) => panel.roofline.filter(one => one[column]).map(one => ({
      panel, i, name: panel.names[one[0]], seconds: one[1], x: one[2] / one[column], y: one[2] / one[1]})));
    const xs = [...this.points.map(point => point.x), peak / rate], ys = [...this.points.map(point => point.y), peak];
    const [x0, x1] = this.decades(xs), [y0, y1] = this.decades(ys);
    const from = 64, top = 12, w = this.width - from - 14, h = this.height - top - 44;
    this.x = x => from + Math.log10(x / x0) / Math.log10(x1 / x0) * w;
    this.y = y => top + h - Math.log10(y / y0) / Math.log10(y1 / y0) * h;
    this.frame(x0, x1, y0, y1, from, top, w, h);
    this.roof(x0, x1, y0, peak, rate);
    this.layers();
    this.chosen(view.chosen);
  }
  decades(values) {
    return [10 ** Math.floor(Math.log10(Math.min(...values)) - .05), 10 ** Math.ceil(Math.log10(Math.max(...values)) + .05)];
  }
  frame(x0, x1, y0, y1, from, top, w, h) {
    for (let x = x0; x <= x1 * 1.001; x *= 10) {
      this.add("line", {x1: this.x(x), x2: this.x(x), y1: top, y2: top + h, class: "grid"});
      this.add("text", {x: this.x(x), y: top + h + 16, "text-anchor": "middle"}, x.toLocaleString("en"));
    }
    for (let y = y0; y <= y1 * 1.001; y *= 10) {
      this.add("line", {x1: from, x2: from + w, y1: this.y(y), y2: this.y(y), class: "grid"});
      this.add("text", {x: from - 6, y: this.y(y) + 4, "text-anchor": "end"}, large(y, "op/s").replace(/\.0+ /, " "));
    }
    const bytes = this.level === "DDR" ? "byte of DDR" : "byte between memory tiles and cores";
    this.add("text", {x: from + w / 2, y: top + h + 36, "text-anchor": "middle"}, "effective operations a " + bytes);
  }
  roof(x0, x1, y0, peak, rate) {
    const begin = Math.max(x0, y0 / rate), ridge = peak / rate;
    const line = [[begin, begin * rate], [ridge, peak], [x1, peak]].map(([x, y]) => this.x(x) + "," + this.y(y)).join(" ");
    this.add("polyline", {points: line, class: "roof"});
    this.add("text", {x: this.x(x1) - 4, y: this.y(peak) - 6, "text-anchor": "end"}, "all cores: " + large(peak, "op/s"));
    const at = Math.sqrt(begin * ridge), tilt = Math.atan2(this.y(peak) - this.y(begin * rate), this.x(ridge) - this.x(begin));
    const [x, y] = [this.x(at), this.y(at * rate) - 6];
    this.add("text", {x, y, "text-anchor": "middle", transform: `rotate(${tilt * 180 / Math.PI} ${x} ${y})`},
      this.level + ": " + large(rate, "B/s"));
  }
  layers() {
    const longest = Math.max(...this.points.map(point => point.seconds), 0) || 1;
    for (const point of this.points) {
      const r = 3 + 8 * Math.sqrt(point.seconds / longest), several = panels.length > 1;
      const dot = this.add("circle", {
        cx: this.x(point.x), cy: this.y(point.y), r, class: "dot " + (several && !point.i ? "dense" : "sparse")});
      dot.dataset.layer = point.name;
      const lines = [(several ? point.panel.title + ": " : "") + point.name, duration(point.seconds),
        large(point.y, "op/s") + ", " + percent(point.y / this.most(point.x)) + " of the roof above",
        point.x.toPrecision(3) + " operations a byte"];
      dot.addEventListener("pointermove", e => tip(lines, e));
      dot.addEventListener("pointerleave", () => tip(null));
      dot.addEventListener("click", () => choose(point.name));
    }
  }
  most(x) { return Math.min(data.roofs.peak, x * data.roofs[this.level]); }
  chosen(name) {
    this.svg.querySelectorAll(".dot").forEach(dot => dot.classList.toggle("chosen", dot.dataset.layer === name));
    this.svg.querySelectorAll(".chosen").forEach(dot => this.svg.append(dot));
  }
}
