// Plots: a line over steps or time with the marks of what happened, its value in words, and its numbers as a table.

import { fill, h, table } from "./dom.js";
import { bytes, measured, number, words } from "./format.js";

const HEIGHT = 190;
// A series of so few points shows each of them.
const FEW = 60;
const TABLE_ROWS = 24;

export const MARKS = {
  recovery: "Recovery",
  attempt: "Attempt",
  state: "State",
  checkpoint: "Checkpoint",
  published: "Published",
};

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** Draw each mark as a line from top to bottom with a sign of its kind on top: the sign tells kinds apart without colour. */
function marksPlugin(marks) {
  return {
    hooks: {
      draw: (u) => {
        const { ctx } = u;
        const ratio = devicePixelRatio;
        const { left, top, width, height } = u.bbox;
        ctx.save();
        ctx.lineWidth = ratio;
        for (const { x, kind } of marks()) {
          if (x === null) continue;
          const at = Math.round(u.valToPos(x, "x", true)) + 0.5;
          if (at < left - 1 || at > left + width + 1) continue;
          ctx.strokeStyle = ctx.fillStyle = color(`--mark-${kind}`);
          ctx.setLineDash(kind === "recovery" ? [] : [3 * ratio, 4 * ratio]);
          ctx.globalAlpha = kind === "checkpoint" ? 0.45 : 0.9;
          ctx.beginPath();
          ctx.moveTo(at, top + 4 * ratio);
          ctx.lineTo(at, top + height);
          ctx.stroke();
          sign(ctx, kind, at, top, 4 * ratio);
        }
        ctx.restore();
      },
    },
  };
}

function sign(ctx, kind, x, y, size) {
  ctx.setLineDash([]);
  ctx.globalAlpha = 1;
  ctx.beginPath();
  if (kind === "recovery") {
    ctx.moveTo(x - size, y);
    ctx.lineTo(x + size, y);
    ctx.lineTo(x, y + 1.6 * size);
  } else if (kind === "attempt") ctx.rect(x - size * 0.8, y, size * 1.6, size * 1.6);
  else if (kind === "checkpoint") ctx.arc(x, y + size * 0.7, size * 0.7, 0, 7);
  else {
    ctx.moveTo(x, y);
    ctx.lineTo(x + size, y + size);
    ctx.lineTo(x, y + 2 * size);
    ctx.lineTo(x - size, y + size);
  }
  ctx.closePath();
  ctx.fill();
}

/** A value beside an axis, where there is little room. */
function tick(value, unit) {
  if (unit === "bytes") return bytes(value);
  const size = Math.abs(value);
  if (size >= 1e9) return `${number(value / 1e9)} G`;
  if (size >= 1e6) return `${number(value / 1e6)} M`;
  if (size >= 1e4) return `${number(value / 1e3)} k`;
  return number(value);
}

export class Chart {
  /**
   * title: its heading. names: metrics drawn together, in the order of their colours. labels: what they are called.
   * shared: { axis, marks, signal, key }: what all plots of a page agree on.
   */
  constructor({ title, names, labels = {}, shared }) {
    Object.assign(this, { title, names, labels, shared });
    this.series = [];
    this.plot = null;
    this.zoomed = false;
    this.readings = h("p", { class: "readings" });
    this.canvas = h("div", { class: "plot", role: "img" });
    this.numbers = h("div");
    this.details = h("details", {}, h("summary", {}, "Values as a table"), this.numbers);
    this.details.addEventListener("toggle", () => this.drawTable());
    this.element = h(
      "figure",
      { class: "chart" },
      h("figcaption", {}, h("h3", {}, title), this.readings),
      this.canvas,
      this.details,
    );
    this.observer = new ResizeObserver(([entry]) => {
      const width = Math.floor(entry.contentRect.width);
      if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
      else if (!this.plot && width > 0 && this.series.length) this.build();
    });
    this.observer.observe(this.canvas);
    const again = () => this.rebuild();
    addEventListener("forge-theme", again);
    shared.signal.addEventListener("abort", () => {
      removeEventListener("forge-theme", again);
      this.observer.disconnect();
      this.plot?.destroy();
    });
  }

  label(name) {
    return this.labels[name] ?? words(name);
  }

  /** Show these series, of which some may be new. */
  set(series) {
    const same = series.length === this.series.length && series.every((one, at) => one.name === this.series[at].name);
    this.series = series;
    if (same && this.plot) {
      // Who looks closer keeps the view while the curve grows.
      this.plot.setData(this.data(), !this.zoomed);
      if (this.zoomed) this.plot.redraw();
      this.describe();
    } else this.rebuild();
  }

  data() {
    const { axis } = this.shared;
    const tables = this.series.map((one) => [one.steps, one.values]);
    const joined = tables.length === 1 ? [...tables[0]] : uPlot.join(tables);
    if (axis.kind === "time") joined[0] = axis.clock.map(Array.from(joined[0]));
    return joined;
  }

  rebuild() {
    this.plot?.destroy();
    this.plot = null;
    if (this.series.length && this.canvas.clientWidth) this.build();
  }

  build() {
    const time = this.shared.axis.kind === "time";
    const { unit } = this.series[0];
    const axis = { stroke: () => color("--muted"), grid: { stroke: () => color("--grid"), width: 1 }, ticks: { show: false }, font: "12px system-ui, sans-serif" };
    const lines = this.series.map((one, at) => ({
      label: this.label(one.name),
      stroke: () => color(`--line-${(at % 5) + 1}`),
      width: 1.6,
      spanGaps: true,
      points: { show: one.values.length <= FEW, size: 5, fill: () => color(`--line-${(at % 5) + 1}`) },
    }));
    this.plot = new uPlot(
      {
        width: this.canvas.clientWidth,
        height: HEIGHT,
        padding: [10, 18, 0, 0],
        legend: { show: false },
        scales: { x: { time } },
        cursor: { sync: { key: this.shared.key }, drag: { x: true, y: false }, points: { size: 7 } },
        axes: [
          { ...axis, space: 70, size: time ? 38 : 26, gap: 4 },
          { ...axis, gap: 4, size: (_, labels) => Math.max(34, 12 + 7 * Math.max(0, ...(labels ?? []).map((label) => label.length))), values: (_, splits) => splits.map((value) => tick(value, unit)) },
        ],
        series: [{}, ...lines],
        plugins: [marksPlugin(this.shared.marks)],
        hooks: { setCursor: [(u) => this.read(u.cursor.idx)], setSelect: [(u) => (this.zoomed ||= u.select.width > 0)] },
      },
      this.data(),
      this.canvas,
    );
    this.zoomed = false;
    this.plot.over.addEventListener("dblclick", () => (this.zoomed = false));
    this.describe();
  }

  /** Tell the values under the cursor, or the newest. */
  read(index) {
    const told = this.series.map((one, at) => {
      let step = one.steps.at(-1);
      let value = one.values.at(-1);
      if (index !== null && index !== undefined && this.plot) {
        const under = this.plot.data[at + 1][index];
        if (under === null || under === undefined) return null;
        value = under;
        step = this.plot.data[0][index];
      }
      return { name: one.name, at, step, value, unit: one.unit };
    });
    const known = told.filter((one) => one !== null);
    const hovered = index !== null && index !== undefined;
    fill(
      this.readings,
      known.map((one) =>
        h(
          "span",
          { class: "reading" },
          h("span", { class: `swatch line-${(one.at % 5) + 1}`, "aria-hidden": "true" }),
          this.series.length > 1 ? `${this.label(one.name)} ` : "",
          h("b", {}, measured(one.value, one.unit)),
        ),
      ),
      hovered && known.length && this.shared.axis.kind !== "time" ? h("span", { class: "muted" }, `step ${number(known[0].step)}`) : null,
    );
  }

  /** Say in words what the plot shows. */
  describe() {
    this.read(null);
    const told = this.series.map((one) => {
      const finite = one.values.filter((value) => value !== null);
      if (!finite.length) return `${this.label(one.name)}: no finite value`;
      let low = finite[0];
      let high = finite[0];
      for (const value of finite) {
        if (value < low) low = value;
        if (value > high) high = value;
      }
      const ends = `steps ${number(one.steps[0])} to ${number(one.steps.at(-1))}`;
      return `${this.label(one.name)}: ${ends}, now ${measured(finite.at(-1), one.unit)}, lowest ${number(low)}, highest ${number(high)}`;
    });
    this.canvas.setAttribute("aria-label", `${this.title}. ${told.join(". ")}. The values are in the table below.`);
    if (this.details.open) this.drawTable();
  }

  drawTable() {
    if (!this.details.open) return;
    const steps = Array.from(new Set(this.series.flatMap((one) => one.steps))).sort((a, b) => a - b);
    const every = Math.max(1, Math.ceil(steps.length / TABLE_ROWS));
    const shown = steps.filter((_, at) => at % every === 0 || at === steps.length - 1);
    const cell = (one, step) => {
      const at = one.place(step);
      return one.steps[at] === step ? number(one.values[at]) : "";
    };
    const columns = ["Step", ...this.series.map((one) => [this.label(one.name), "num"])];
    const rows = shown.map((step) => [number(step), ...this.series.map((one) => cell(one, step))]);
    fill(this.numbers, table(`${this.title}, ${shown.length} of ${steps.length} steps`, columns, rows));
  }

  redraw() {
    this.plot?.redraw(false);
  }
}

/** A histogram as bars, each with its share in words. */
export class Bars {
  constructor({ title, label }) {
    this.label = label;
    this.readings = h("p", { class: "readings" });
    this.list = h("ol", { class: "bars" });
    this.element = h("figure", { class: "chart" }, h("figcaption", {}, h("h3", {}, title), this.readings), this.list);
  }

  set(step, bins) {
    const most = Math.max(...bins.filter((one) => one !== null), 1e-12);
    fill(this.readings, h("span", { class: "muted" }, `step ${number(step)}`));
    if (this.list.children.length !== bins.length) {
      fill(
        this.list,
        bins.map(() => h("li", {}, h("span", { class: "fill", "aria-hidden": "true" }), h("span", { class: "share" }), h("span", { class: "bin" }))),
      );
    }
    bins.forEach((share, at) => {
      const [bar, value, name] = this.list.children[at].children;
      bar.style.height = `${Math.round((Math.max(0, share ?? 0) / most) * 128)}px`;
      value.textContent = share === null ? "–" : `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} %`;
      name.textContent = this.label(at);
    });
  }
}
