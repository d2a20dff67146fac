// Pictures of Γ: a row an input block, a column an output block.
const BOX = 208;  // pixels that a picture may take

class Gamma {
  constructor([name, rows, columns, bits]) {
    const packed = atob(bits), kept = i => packed.charCodeAt(i >> 3) >> (7 - (i & 7)) & 1;
    Object.assign(this, {rows, columns, kept});
    let count = 0;
    for (let i = 0; i < rows * columns; i++) count += kept(i);
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    const button = document.createElement("button"), words = document.createElement("span");
    const about = `${rows} x ${columns} blocks, ${percent(count / (rows * columns))} kept`;
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", `Γ of ${name}: ${about}`);
    button.type = "button";
    button.textContent = name;
    button.addEventListener("click", () => choose(name));
    words.textContent = about;
    caption.append(button, words);
    figure.append(this.canvas, caption);
    by("gammas").append(figure);
    Object.assign(this, {name, figure});
    this.paint();
  }
  paint() {
    const {rows, columns, canvas} = this, ratio = window.devicePixelRatio || 1;
    const scale = Math.max(1, Math.min(12, Math.floor(BOX / Math.max(rows, columns)))), gap = scale > 4 ? 1 : 0;
    canvas.width = columns * scale * ratio;
    canvas.height = rows * scale * ratio;
    canvas.style.width = columns * scale + "px";
    const g = canvas.getContext("2d");
    g.scale(ratio, ratio);
    g.fillStyle = color("zero");
    if (!gap) g.fillRect(0, 0, columns * scale, rows * scale);
    for (let i = 0; i < rows * columns; i++) {
      const kept = this.kept(i);
      if (!kept && !gap) continue;
      g.fillStyle = color(kept ? "kept" : "zero");
      g.fillRect(i % columns * scale, Math.floor(i / columns) * scale, scale - gap, scale - gap);
    }
  }
  draw() {}
  chosen(name) { this.figure.classList.toggle("chosen", this.name === name); }
}
