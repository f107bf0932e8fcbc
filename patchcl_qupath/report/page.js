"use strict";

// The button of a column sorts the table by it; pressed again, in the opposite order.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.closest("th");
    const body = header.closest("table").tBodies[0];
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentNode.children) {
      if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
    }
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[header.cellIndex].dataset.value;
    const numeric = header.classList.contains("number");
    const order = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [value(one), value(other)];
      if (a === "" || b === "") return (a === "") - (b === ""); // unknown values come last
      return up ? order(a, b) : order(b, a);
    });
    body.append(...rows);
    document.getElementById("sorted").textContent =
      "Sorted by " + button.textContent.trim() + (up ? ", ascending" : ", descending");
  });
}

// A link to an image opens it.
function show(hash) {
  const target = document.getElementById(decodeURIComponent(hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
}
for (const link of document.querySelectorAll("tbody a")) {
  link.addEventListener("click", () => show(link.hash));
}
show(location.hash);

// Contours of nuclei can be hidden.
const contours = document.getElementById("contours");
if (contours) {
  contours.addEventListener("change", () => {
    document.body.classList.toggle("plain", !contours.checked);
  });
}
// All images open or close at once.
const all = document.getElementById("all");
if (all) {
  all.addEventListener("click", () => {
    const images = [...document.querySelectorAll("details.image")];
    const closed = images.some((image) => !image.open);
    for (const image of images) image.open = closed;
    all.textContent = closed ? "Close all" : "Open all";
  });
}
