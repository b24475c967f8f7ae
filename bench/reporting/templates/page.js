const table = document.getElementById("figures");
const heads = [...table.tHead.rows[1].cells];
const body = table.tBodies[0];
heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const falling = head.getAttribute("aria-sort") === "ascending";
  const isText = head.dataset.kind === "text";
  const value = (row) => row.cells[column].dataset.v;
  const compare = (a, b) => isText ? value(a).localeCompare(value(b)) : value(a) - value(b);
  const rows = [...body.rows].sort((a, b) => falling ? compare(b, a) : compare(a, b));
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
  body.append(...rows);
}));
