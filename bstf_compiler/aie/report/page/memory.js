// The map of a memory tile: addresses upwards, what is held as boxes over the time that it is held.
const MAP = 150;
const LIMIT = Math.max(...panels.map(panel => panel.memory.limit));
const PEAK = Math.max(0, ...panels.flatMap(panel => panel.memory.held.map(([, , address, bytes]) => address + bytes)));
const TALLEST = PEAK > .4 * LIMIT ? LIMIT : 1.2 * PEAK || 1;  // of little in a large memory nothing would be seen

class MemoryMap {
  constructor(canvas, panel) {
    Object.assign(this, {canvas, panel});
    interact(this);
  }
  height(bytes) { return bytes / TALLEST * (MAP - 8); }
  draw() {
    const g = paper(this, MAP + AXIS), {held} = this.panel.memory, right = this.canvas.clientWidth;
    if (wide(this.canvas) <= 0) return;
    g.fillStyle = color("quiet");
    const top = TALLEST < LIMIT ? PEAK : LIMIT;
    g.fillText(kib(top).replace(".0 ", " "), 0, MAP - this.height(top));
    g.fillText("0", 0, MAP - 7);
    inside(this, g, MAP, () => {
      for (const one of held) {
        const [name, kind, , , start, end] = one, [top, tall] = this.box(one);
        const a = Math.max(place(this, start), left(this.canvas) - 2), b = Math.min(place(this, end), right + 2);
        if (b < a) continue;
        g.fillStyle = color(HELD[kind].split(" ").pop());
        g.fillRect(a, top, Math.max(.7, b - a - .7), Math.max(.7, tall - .7));
        const letters = Math.floor((b - a - 8) / 6.4);
        if (tall < 13 || letters < Math.min(6, name.length)) continue;
        g.fillStyle = color("on-box");
        g.fillText(name.length > letters ? name.slice(0, letters - 1) + "…" : name, a + 4, top + Math.min(tall / 2, 10));
      }
      g.fillStyle = color("quiet");
      if (top === LIMIT) {
        for (let px = left(this.canvas); px < right; px += 8) g.fillRect(px, MAP - 1 - this.height(top), 4, 1);
      }
      g.textAlign = "right";
      if (top < LIMIT) g.fillText("the limit is above: " + kib(LIMIT).replace(".0 ", " "), right - 4, 9);
      g.textAlign = "left";
      g.fillRect(left(this.canvas), MAP - 1, right, 1);
    });
  }
  box([, , address, bytes]) { return [MAP - 1 - this.height(address + bytes), this.height(bytes)]; }
  describe(x, y) {
    const t = time(this, x), {held, limit} = this.panel.memory;
    const now = held.filter(([, , , , start, end]) => start <= t && t < end);
    const one = now.find(box => y >= this.box(box)[0] && y < this.box(box)[0] + this.box(box)[1]);
    const used = now.reduce((sum, box) => sum + box[3], 0);
    const total = kib(used) + " of " + kib(limit) + " held at " + duration(t);
    if (!one) return [total];
    const [name, kind, address, bytes, start, end] = one;
    return [name + (name.startsWith(HELD[kind]) ? "" : " (" + HELD[kind] + ")"),
      number(bytes) + " bytes at address " + number(address),
      "held from " + duration(start) + " to " + duration(end), total];
  }
}
