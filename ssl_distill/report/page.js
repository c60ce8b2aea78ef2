"use strict";
const values = document.getElementById("values");
const shown = (value, percent) => (percent ? (100 * value).toFixed(1) + " %" : Number(value.toPrecision(4)).toString());

for (const svg of document.querySelectorAll(".chart svg")) {
  const [left, top, right, bottom] = svg.dataset.frame.split(" ").map(Number);
  const { low, high, right: steps } = svg.dataset;
  const lines = [...svg.querySelectorAll("polyline")].map((line) => ({
    label: line.dataset.label,
    color: line.classList[0],
    points: line.getAttribute("points").split(" ").map((pair) => pair.split(",").map(Number)),
  }));
  const rule = document.createElementNS("http://www.w3.org/2000/svg", "path");
  rule.setAttribute("class", "rule");
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const pointer = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = Math.min(Math.max(pointer, left), right);
    rule.setAttribute("d", `M${x} ${top}V${bottom}`);
    svg.append(rule);
    values.replaceChildren();
    const head = document.createElement("div");
    head.textContent = "step " + Math.round(((x - left) / (right - left)) * steps).toLocaleString("en");
    values.append(head);
    for (const line of lines) {
      const near = line.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
      const value = Number(high) - ((near[1] - top) / (bottom - top)) * (high - low);
      const row = document.createElement("div");
      const name = document.createElement("span");
      const chip = document.createElement("i");
      chip.className = "chip " + line.color;
      name.append(chip, line.label);
      const text = document.createElement("b");
      text.textContent = shown(value, "percent" in svg.dataset);
      row.append(name, text);
      values.append(row);
    }
    values.style.display = "block";
    values.style.left = Math.min(event.clientX + 14, innerWidth - values.offsetWidth - 8) + "px";
    values.style.top = Math.min(event.clientY + 14, innerHeight - values.offsetHeight - 8) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    rule.remove();
    values.style.display = "none";
  });
}
for (const picture of document.querySelectorAll(".pictures img")) {
  picture.addEventListener("click", () => picture.classList.toggle("large"));
}
addEventListener("keydown", (event) => {
  if (event.key === "Escape") for (const large of document.querySelectorAll(".large")) large.classList.remove("large");
});
for (const button of document.querySelectorAll(".command button")) {
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.nextElementSibling.textContent);
    button.textContent = "copied";
  });
}
