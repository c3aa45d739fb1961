// Small line charts of the last minutes, drawn as SVG.

const SVG = "http://www.w3.org/2000/svg";
export const SPAN = 300; // seconds that a chart shows
const LEFT = 48;
const TOP = 6;
const BOTTOM = 8;

function svg(name, attributes, parent) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.append(node);
  return node;
}

function html(name, className, parent) {
  const node = document.createElement(name);
  node.className = className;
  parent.append(node);
  return node;
}

// The smallest of 1, 2, 5 times a power of ten that is not below the value.
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  for (const step of [1, 2, 5]) if (value <= step * power) return step * power;
  return 10 * power;
}

// series: [{name, field}], drawn from samples {time, [field]: number or null}; null breaks the line.
export class Chart {
  constructor(parent, { title, series, format, top = null, least = 1, empty = "no data yet" }) {
    this.series = series;
    this.format = format;
    this.fixedTop = top;
    this.least = least; // of an axis that fits its values
    this.empty = empty;
    this.samples = [];
    this.now = 0;
    this.pointer = null;

    const box = html("figure", "chart", parent);
    const head = html("div", "chart-head", box);
    html("span", "chart-title", head).textContent = title;
    const readings = html("span", "readings", head);
    this.readings = series.map(({ name }, index) => {
      const reading = html("span", "reading", readings);
      if (series.length > 1) {
        html("span", `key s${index}`, reading);
        html("span", "name", reading).textContent = name;
      }
      return html("span", "value", reading);
    });
    this.plot = svg("svg", { class: "plot", role: "img", "aria-label": title }, box);
    this.plot.addEventListener("pointermove", (event) => {
      this.pointer = event.offsetX;
      this.draw();
    });
    this.plot.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.draw();
    });
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  update(samples, now) {
    this.samples = samples;
    this.now = now;
    this.draw();
  }

  draw() {
    const width = this.plot.clientWidth;
    const height = this.plot.clientHeight;
    if (width < LEFT + 10) return;
    const values = this.samples.flatMap((sample) =>
      this.series.map(({ field }) => sample[field]).filter((value) => value != null));
    const top = this.fixedTop ?? ceiling(Math.max(this.least, ...values));
    const x = (time) => width - 2 - ((this.now - time) / SPAN) * (width - LEFT - 4);
    const y = (value) => height - BOTTOM - (Math.min(value, top) / top) * (height - TOP - BOTTOM);

    this.plot.replaceChildren();
    this.plot.dataset.points = values.length;
    for (const share of [0, 0.5, 1]) {
      const at = Math.round(y(share * top)) + 0.5;
      svg("line", { class: "grid", x1: LEFT, x2: width, y1: at, y2: at }, this.plot);
      const label = svg("text", { class: "axis", x: LEFT - 6, y: at + 3.5, "text-anchor": "end" }, this.plot);
      label.textContent = this.format(share * top, true);
    }
    this.series.forEach(({ field }, index) => {
      const path = this.path(field, x, y);
      if (path) svg("path", { class: `line s${index}`, d: path }, this.plot);
    });
    if (!values.length) {
      const note = svg("text", { class: "none", x: (width + LEFT) / 2, y: height / 2 - 6 }, this.plot);
      note.textContent = this.empty;
    }
    this.read(this.cursor(x, width, height));
  }

  path(field, x, y) {
    let path = "";
    let drawing = false;
    for (const sample of this.samples) {
      const value = sample[field];
      if (value == null) {
        drawing = false;
        continue;
      }
      const point = `${x(sample.time).toFixed(1)} ${y(value).toFixed(1)}`;
      path += drawing ? `L${point}` : `M${point}h0.01`; // a lone point shows as a dot
      drawing = true;
    }
    return path;
  }

  // The sample nearest to the pointer, marked by a line; without a pointer the latest one.
  cursor(x, width, height) {
    const latest = this.samples.at(-1);
    if (this.pointer === null || !latest) return latest;
    let nearest = latest;
    for (const sample of this.samples) {
      if (Math.abs(x(sample.time) - this.pointer) < Math.abs(x(nearest.time) - this.pointer)) nearest = sample;
    }
    const at = x(nearest.time);
    svg("line", { class: "cursor", x1: at, x2: at, y1: TOP, y2: height - BOTTOM }, this.plot);
    return nearest;
  }

  read(sample) {
    this.series.forEach(({ field }, index) => {
      const value = sample?.[field];
      this.readings[index].textContent = value == null ? "–" : this.format(value, false);
    });
  }
}
