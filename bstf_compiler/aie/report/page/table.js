// The table of layers: sorts by its headings, shows the rows that hold the words that are searched for.
class LayerTable {
  constructor(table) {
    this.rows = [...table.tBodies[0].rows];
    this.heads = [...table.tHead.rows[0].cells];
    this.body = table.tBodies[0];
    this.heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => this.sort(head, i)));
    this.rows.forEach(row => row.querySelector("button").addEventListener("click", e =>
      choose(e.currentTarget.dataset.layer)));
    by("search").addEventListener("input", e => this.search(e.target.value));
    by("more").addEventListener("change", e => table.classList.toggle("all", e.target.checked));
    this.search("");
  }
  sort(head, i) {
    const numbers = head.classList.contains("number"), now = head.getAttribute("aria-sort");
    const first = numbers && i ? "descending" : "ascending";  // of numbers the largest interest, of places the first
    const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
    this.heads.forEach(one => one.setAttribute("aria-sort", one === head ? order : "none"));
    const value = row => {
      const held = row.cells[i].dataset.value;
      return numbers ? (held === "" ? -Infinity : +held) : (held || row.cells[i].textContent).toLowerCase();
    };
    const sign = order === "ascending" ? 1 : -1;
    this.rows.sort((a, b) => value(a) < value(b) ? -sign : value(a) > value(b) ? sign : 0);
    this.body.append(...this.rows);
    by("status").textContent = "Sorted by " + head.textContent + ", " + order + ".";
  }
  search(words) {
    const wanted = words.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of this.rows) {
      const held = [...row.cells].filter(cell => cell.classList.contains("words"))
        .map(cell => cell.dataset.value || cell.textContent).join(" ").toLowerCase();
      row.hidden = !wanted.every(word => held.includes(word));
    }
    const shown = this.rows.filter(row => !row.hidden).length;
    by("found").textContent = shown + " of " + this.rows.length + " layers";
  }
  draw() {}
  chosen(name) {
    this.rows.forEach(row => row.classList.toggle("chosen", row.querySelector("button").dataset.layer === name));
  }
}
