// The lanes of a program, a lane a kind of instruction, and the bandwidth of DDR below them.
const [LAYER, KIND, UNIT, START, END, BUSY, BYTES, MACS] = [0, 1, 2, 3, 4, 5, 6, 7];
const BAND = 20, LANE = 25, ROW = 9, GAP = 5, GRAPH = 52;
const share = (row, s) => s[END] > s[START] ? Math.min(1, s[BUSY] / ((s[END] - s[START]) * row.units)) : 0;

async function unpack(panel) {  // the spans of single units, which few look at: unpacked when they do
  if (panel.rows || !panel.spans) return;
  const bytes = Uint8Array.from(atob(panel.spans.deflated), letter => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer(), n = panel.spans.count;
  let at = 0;
  const column = Kind => {
    const made = new Kind(buffer, at, n);
    at += made.byteLength;
    return made;
  };
  const [moved, macs, starts, ends, work] = [Float64Array, Float64Array, Uint32Array, Uint32Array, Uint32Array].map(column);
  const [layers, units, kinds] = [Uint16Array, Uint16Array, Uint8Array].map(column);
  const tick = data.horizon / (2 ** 32 - 1);
  panel.rows = Array.from({length: n}, (_, i) =>
    [layers[i], kinds[i], units[i], starts[i] * tick, ends[i] * tick, work[i] * tick, moved[i], macs[i]]);
}

class Lanes {
  constructor(canvas, panel) {
    Object.assign(this, {canvas, panel});
    const {times, parts} = panel.ddr;
    this.integrals = parts.map(([, amounts]) => {
      let sum = 0;
      return [0, ...amounts.map((amount, i) => sum += amount * (times[i + 1] - times[i]))];
    });
    const totals = times.slice(1).map((_, i) => parts.reduce((sum, part) => sum + part[1][i], 0));
    this.scale = Math.max(panel.ddr.limit, totals.reduce((a, b) => Math.max(a, b), 0)) || 1;
    this.layout();
    interact(this);
  }
  layout() {  // rows: {y, h, label, color, items, units}
    const {panel} = this, perUnit = view.perUnit && panel.rows;
    let y = BAND + GAP;
    this.rows = data.kinds.flatMap((kind, k) => {
      const units = panel.units[k], list = (perUnit ? panel.rows : panel.bars).filter(s => s[KIND] === k);
      const lanes = perUnit && units.length ? units.map((_, u) => u) : [-1];
      const made = lanes.map((u, i) => {
        const row = {
          y, h: u < 0 ? LANE - GAP : ROW - 1, items: u < 0 ? list : list.filter(s => s[UNIT] === u),
          color: kind.toLowerCase(), units: u < 0 ? units.length : 1, label: i ? "" : kind};
        y += u < 0 ? LANE : ROW;
        return row;
      });
      if (lanes[0] >= 0) y += GAP;
      return made;
    });
    this.graph = {y: y + GAP, h: GRAPH - 2 * GAP};
    this.bottom = y + GRAPH;
  }
  draw() {
    const g = paper(this, this.bottom + AXIS);
    if (wide(this.canvas) <= 0) return;
    g.fillStyle = color("quiet");
    g.fillText("layers", 0, BAND / 2);
    g.fillText("DDR", 0, this.graph.y + this.graph.h / 2 - 7);
    g.font = "11px system-ui, sans-serif";
    g.fillText(large(this.panel.ddr.limit, "B/s"), 0, this.graph.y + this.graph.h / 2 + 8);
    g.font = "12px system-ui, sans-serif";
    for (const row of this.rows) {
      g.fillStyle = color(row.color + "-ink");
      g.fillText(row.label, 0, row.y + row.h / 2);
    }
    inside(this, g, this.bottom, () => {
      this.drawBand(g);
      this.rows.forEach(row => this.drawRow(g, row));
      this.drawBandwidth(g);
    });
  }
  drawBand(g) {
    const right = this.canvas.clientWidth, from = left(this.canvas);
    this.panel.layers.forEach(([name, start, seconds], i) => {
      const a = Math.max(place(this, start), from), b = Math.min(place(this, start + seconds), right);
      if (b < from || a > right) return;
      g.fillStyle = color(i % 2 ? "band" : "band2");
      g.fillRect(a, 0, b - a, BAND);
      const words = this.panel.names[name], letters = Math.floor((b - a - 8) / 6.6);
      if (letters < Math.min(6, words.length)) return;
      g.fillStyle = color("ink");
      g.fillText(words.length > letters ? words.slice(0, letters - 1) + "…" : words, a + 4, BAND / 2 + 1);
    });
  }
  drawRow(g, row) {
    const end = this.panel.origin + view.start + view.span, from = left(this.canvas), right = this.canvas.clientWidth + 1;
    g.fillStyle = color(row.color);
    let last = -1;  // pixel column of the last span thinner than a pixel: one is enough there
    for (const s of row.items) {
      if (s[END] < this.panel.origin + view.start || s[START] > end) continue;
      const a = Math.max(place(this, s[START]), from - 1), b = Math.min(place(this, s[END]), right);
      if (b - a < 1) {
        if (Math.floor(a) === last) continue;
        last = Math.floor(a);
      }
      const w = Math.max(b - a, .6), solid = row.h * share(row, s);
      g.globalAlpha = .25;
      g.fillRect(a, row.y, w, row.h);
      g.globalAlpha = 1;
      g.fillRect(a, row.y + row.h - solid, w, solid);
    }
  }
  until(part, t) {  // bytes of a part until a time
    const {times, parts} = this.panel.ddr, last = times.length - 1, integral = this.integrals[part];
    if (t <= times[0]) return 0;
    if (t >= times[last]) return integral[last];
    let low = 0, high = last;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (times[middle] <= t) low = middle; else high = middle;
    }
    return integral[low] + parts[part][1][low] * (t - times[low]);
  }
  rate(part, px) {  // mean bytes/s in a column of pixels
    const start = time(this, px), end = time(this, px + 1);
    return (this.until(part, end) - this.until(part, start)) / (end - start);
  }
  drawBandwidth(g) {
    const {y, h} = this.graph, {parts, limit} = this.panel.ddr, right = this.canvas.clientWidth;
    for (let px = left(this.canvas); px < right; px++) {
      let bottom = y + h;
      parts.forEach(([name], part) => {
        const tall = this.rate(part, px) / this.scale * h;
        if (tall < .05) return;
        g.fillStyle = color(name.toLowerCase());
        g.fillRect(px, bottom - tall, 1, tall);
        bottom -= tall;
      });
    }
    g.fillStyle = color("quiet");
    for (let px = left(this.canvas); px < right; px += 8) g.fillRect(px, y + h - limit / this.scale * h, 4, 1);
    g.fillRect(left(this.canvas), y + h, right, 1);
  }
  describe(x, y) {
    const {panel, graph} = this, t = time(this, x), slack = 2 * view.span / wide(this.canvas);
    const row = this.rows.find(r => y >= r.y && y < r.y + r.h);
    if (row) {
      const length = s => s[END] - s[START];
      const hit = row.items.filter(s => s[START] - slack <= t && t <= s[END] + slack)
        .reduce((a, s) => a && length(a) <= length(s) ? a : s, null);
      return hit && this.tell(row, hit);
    }
    if (y >= graph.y && y < graph.y + graph.h) {
      const rates = panel.ddr.parts.map((_, part) => this.rate(part, x));
      return ["DDR at " + duration(t), ...panel.ddr.parts.map(([name], part) => name + ": " + large(rates[part], "B/s")),
        large(rates.reduce((a, b) => a + b, 0), "B/s") + " of " + large(panel.ddr.limit, "B/s")];
    }
    const layer = y < BAND && layerAt(panel, t);
    return layer ? [panel.names[layer[0]], duration(layer[2]), "bound by " + layer[3]] : null;
  }
  tell(row, s) {
    const all = this.panel.units[s[KIND]], single = view.perUnit && this.panel.rows;
    return [data.kinds[s[KIND]] + " " + this.panel.names[s[LAYER]],
      single ? all[s[UNIT]] : s[UNIT] + " of " + all.length + " units",
      "from " + duration(s[START]) + " to " + duration(s[END]),
      duration(s[END] - s[START]) + ", " + percent(share(row, s)) + " at work",
      number(s[BYTES]) + " bytes, " + number(s[MACS]) + " multiply-adds"];
  }
}
