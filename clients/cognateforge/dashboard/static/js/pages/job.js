// One job: its curves with what happened to it, live.

import { about, follow, get, wish } from "../api.js";
import { Bars, Chart, MARKS } from "../chart.js";
import { facts, fill, h, section, table } from "../dom.js";
import { bytes, measured, number, span, time, title, words } from "../format.js";
import { artifactLink, digest, jobBadge, lineage, progress } from "../parts.js";
import { Clock, Series } from "../series.js";

// Drawn together, in this order; what is in none of them is drawn alone behind them.
const GROUPS = [
  ["Loss", { loss: "training", validation_loss: "validation", validation_loss_memory_off: "validation, memory off", validation_loss_one_step: "validation, one step", control_validation_loss: "control" }],
  ["Return", { return: "training", validation_return: "validation" }],
  ["Accuracy", { train_accuracy: "training", train_token_accuracy: "training, tokens", train_preference_accuracy: "training, pairs", validation_accuracy: "validation" }],
  ["Learning rate", { learning_rate: "learning rate" }],
  ["Ponder steps", { mean_ponder_steps: "mean" }],
  ["Memory slots in use", { memory_slot_utilization_ratio: "share" }],
  ["Slow gradient", { slow_gradient_norm_ratio: "norm ratio", slow_gradient_cosine: "cosine" }],
  ["Gradient norm", { gradient_norm: "norm" }],
  ["GrokFast lambda", { grokfast_lambda: "lambda" }],
  ["Tokens per second", { tokens_per_s: "tokens" }],
];
// Shown in words at the top.
const HIDDEN = new Set(["seconds_left"]);
// Above so many points of a series the server thins them anew.
const MOST_POINTS = 4_000;
const DRAW_EVERY_MS = 250;
const LOG_LINES = 2_000;
// Of a line without an end, as a progress bar writes, so much is shown.
const LINE_LENGTH = 20_000;
const RETRY_MS = 3_000;
const EVENTS_SHOWN = 300;
const ENDED = ["SUCCEEDED", "FAILED", "CANCELLED"];
const VERBS = { pause: "Pause", resume: "Resume", cancel: "Cancel" };

export async function render({ main, parameters, signal, setTitle }) {
  const page = new JobPage(parameters.service, parameters.id, signal);
  const [job, metrics] = await Promise.all([get(page.path, signal), get(`${page.path}/metrics`, signal)]);
  setTitle(`Job ${parameters.id.slice(0, 8)}`);
  page.begin(main, job, metrics.series);
  await page.actions();
}

class JobPage {
  constructor(service, id, signal) {
    Object.assign(this, { service, id, signal });
    this.path = `/api/jobs/${service}/${id}`;
    this.series = new Map();
    this.charts = new Map();
    this.events = [];
    this.kinds = new Set(Object.keys(MARKS));
    this.axis = { kind: "step", clock: new Clock() };
    this.shared = { axis: this.axis, marks: () => this.marks(), signal, key: `job-${id}` };
    this.timer = null;
    this.drawnAt = 0;
    this.thinning = false;
  }

  begin(main, job, series) {
    this.job = job;
    // Events up to here are in the metrics and the history; the stream goes on behind them.
    this.sequence = job.last_sequence;
    for (const one of series) this.series.set(one.name, new Series(one));
    this.layout(main);
    this.drawHead();
    this.drawCharts();
    this.listen();
    void this.readHistory();
    void this.readCheckpoints();
    if (job.artifact) void this.readLineage(job.artifact);
  }

  layout(main) {
    const kind = this.service === "cognate" ? "Pretraining" : "Agent training";
    const made = this.job.plan.agent ? ` of ${this.job.plan.agent}` : "";
    this.badge = h("span", { role: "status" });
    this.head = h("div", { class: "stack-tight" });
    this.buttons = h("div", { class: "actions" });
    this.chartGrid = h("div", { class: "charts" });
    this.legend = h("fieldset", { class: "marks" }, h("legend", {}, "Marks"), Object.entries(MARKS).map(([mark, label]) => this.toggle(mark, label)));
    this.timeline = h("div");
    this.checkpoints = h("div", {}, h("p", { class: "empty" }, "No checkpoint yet."));
    this.made = h("div", {}, h("p", { class: "empty" }, "Nothing was published yet."));
    fill(
      main,
      h("p", { class: "crumbs" }, h("a", { href: `/jobs?service=${this.service}` }, "Jobs")),
      h("div", { class: "title" }, h("h1", {}, `${kind}${made} `, h("span", { class: "mono" }, this.id.slice(0, 8))), this.badge, this.buttons),
      this.head,
      h(
        "div",
        { class: "columns" },
        h(
          "div",
          { class: "stack" },
          h("section", { "aria-labelledby": "curves" }, h("div", { class: "tools" }, h("h2", { id: "curves" }, "Curves"), this.axisSwitch(), this.legend), this.chartGrid),
        ),
        h(
          "div",
          { class: "stack" },
          section("Events", this.timeline),
          section("Checkpoints", this.checkpoints),
          section("Published", this.made),
          section("Plan", planFacts(this.job)),
        ),
      ),
      this.logs(),
    );
  }

  axisSwitch() {
    const option = (kind, label) =>
      h("label", {}, h("input", { type: "radio", name: "axis", checked: this.axis.kind === kind, onchange: () => this.setAxis(kind) }), h("span", {}, label));
    return h("fieldset", { class: "segmented" }, h("legend", { class: "sr" }, "Horizontal axis"), option("step", "Steps"), option("time", "Time"));
  }

  setAxis(kind) {
    this.axis.kind = kind;
    for (const chart of this.charts.values()) chart.rebuild?.();
  }

  toggle(mark, label) {
    const change = (event) => {
      if (event.target.checked) this.kinds.add(mark);
      else this.kinds.delete(mark);
      for (const chart of this.charts.values()) chart.redraw?.();
    };
    return h("label", {}, h("input", { type: "checkbox", checked: true, onchange: change }), h("span", { class: `sign ${mark}`, "aria-hidden": "true" }), label);
  }

  marks() {
    const time = this.axis.kind === "time";
    return this.events
      .filter((event) => this.kinds.has(event.mark) && (time || event.step > 0))
      .map((event) => ({ kind: event.mark, x: time ? event.time : event.step }));
  }

  // --- what is drawn

  drawHead() {
    const { job } = this;
    fill(this.badge, jobBadge(job));
    const left = this.series.get("seconds_left")?.last?.value;
    const over = ENDED.includes(job.state);
    const speed = this.series.get(this.service === "cognate" ? "tokens_per_s" : "samples_per_s")?.last;
    fill(
      this.head,
      h("div", { class: "line-progress" }, progress(job.step, job.total_steps, "Progress"), h("span", {}, h("b", {}, number(job.step)), ` of ${number(job.total_steps)} steps`)),
      facts([
        ["Attempt", job.attempt || ""],
        ["Submitted", time(job.create_time)],
        ["By", job.caller],
        ["Started", time(job.start_time)],
        [over ? "Ended" : "", over ? time(job.end_time) : ""],
        ["Left", !over && left ? span(left) : ""],
        ["Speed", !over && speed ? measured(speed.value, this.service === "cognate" ? "tokens/s" : "rows/s") : ""],
        ["Priority", job.scheduling?.priority || ""],
        ["Trace", job.trace_id ? h("code", {}, job.trace_id) : ""],
      ].filter(([name]) => name)),
      job.failure ? h("p", { class: "notice bad" }, h("b", {}, job.failure.reason), ` ${job.failure.message}`) : null,
      job.wait ? h("p", { class: "notice" }, h("b", {}, `Waits: ${words(job.wait.reason).toLowerCase()}. `), job.wait.message) : null,
    );
  }

  drawCharts() {
    const placed = new Set(HIDDEN);
    const groups = GROUPS.map(([name, labels]) => [name, Object.keys(labels), labels]);
    for (const [, names] of groups) for (const name of names) placed.add(name);
    const rest = Array.from(this.series.keys()).filter((name) => !placed.has(name)).sort();
    for (const name of rest) groups.push([title(name.replace(/_(bytes|nats|ratio|rms)$/, "")), [name], {}]);
    for (const [name, names, labels] of groups) {
      const found = names.map((one) => this.series.get(one)).filter(Boolean);
      if (!found.length) continue;
      if (!this.charts.has(name)) this.addChart(name, new Chart({ title: name, names, labels, shared: this.shared }));
      this.charts.get(name).set(found);
    }
    if (!this.charts.size) {
      this.empty ??= this.chartGrid.appendChild(h("p", { class: "empty card" }, "Nothing was measured yet. Curves appear with the first step."));
    } else {
      this.empty?.remove();
      this.empty = null;
    }
  }

  addChart(name, chart) {
    this.charts.set(name, chart);
    // The halting histogram stands behind the ponder steps that it explains.
    this.chartGrid.append(chart.element);
  }

  drawBins(step, bins) {
    for (const [name, shares] of Object.entries(bins)) {
      if (!this.charts.has(name)) {
        const halting = name === "halting_histogram";
        const label = (at) => (halting ? (at === 0 ? "1 step" : `${at + 1}`) : `${at}`);
        const bars = new Bars({ title: halting ? "Tokens by ponder steps" : title(name), label });
        this.charts.set(name, bars);
        const beside = this.charts.get("Ponder steps")?.element;
        if (halting && beside) beside.after(bars.element);
        else this.chartGrid.append(bars.element);
      }
      this.charts.get(name).set(step, shares);
    }
  }

  soon() {
    const wait = Math.max(0, DRAW_EVERY_MS - (performance.now() - this.drawnAt));
    this.timer ??= setTimeout(() => {
      this.timer = null;
      this.drawnAt = performance.now();
      if (this.signal.aborted) return;
      this.drawHead();
      this.drawCharts();
      this.drawTimeline();
      if (this.bins) this.drawBins(this.bins.step, this.bins.bins);
    }, wait);
  }

  drawTimeline() {
    const newest = this.events.slice(-EVENTS_SHOWN).reverse();
    if (this.drawn === this.events.length) return;
    this.drawn = this.events.length;
    if (!newest.length) {
      fill(this.timeline, h("p", { class: "empty" }, "Nothing happened yet."));
      return;
    }
    fill(
      this.timeline,
      h("ol", { class: "timeline", tabindex: "0", role: "list", "aria-label": "Events, newest first" },
        newest.map((event) =>
          h(
            "li",
            { class: event.mark ?? "" },
            h("span", { class: `sign ${event.mark ?? "note"}`, "aria-hidden": "true" }),
            h("div", {}, h("p", {}, tell(event, this.service)), h("p", { class: "muted" }, time(event.time), event.step ? ` · step ${number(event.step)}` : "", event.attempt ? ` · attempt ${event.attempt}` : ""), recovered(event)),
          ),
        ),
      ),
      this.events.length > EVENTS_SHOWN ? h("p", { class: "muted" }, `The newest ${EVENTS_SHOWN} of ${number(this.events.length)}.`) : null,
    );
  }

  // --- what comes

  listen() {
    follow(
      () => `${this.path}/events?after=${this.sequence}`,
      {
        events: (events) => this.take(events),
        gap: ({ after }) => (this.sequence = after),
        end: (_, stop) => {
          stop();
          void this.refresh();
        },
        refused: (error, stop) => {
          stop();
          this.head.append(h("p", { class: "notice bad" }, `${error.reason}: ${error.message}`));
        },
      },
      { signal: this.signal },
    );
  }

  take(events) {
    let changed = false;
    for (const event of events) {
      if (event.sequence <= this.sequence) continue;
      this.sequence = event.sequence;
      if (event.kind === "progress") this.takeProgress(event);
      else {
        changed = true;
        this.addEvent({ ...event, step: stepOf(event) ?? this.job.step });
        if (event.kind === "checkpoint") void this.readCheckpoints();
      }
    }
    this.job.last_sequence = this.sequence;
    this.soon();
    // State, attempt, wait and failure are the job's own words, not to be guessed from its events.
    if (changed) void this.refresh();
    if (Math.max(0, ...Array.from(this.series.values(), (one) => one.steps.length)) > MOST_POINTS) void this.thin();
  }

  takeProgress(event) {
    this.job.step = event.step;
    this.job.total_steps = event.total_steps;
    this.axis.clock.put(event.step, event.time);
    for (const [name, value] of Object.entries(event.metrics)) {
      if (!this.series.has(name)) this.series.set(name, new Series({ name, unit: event.units[name] }));
      this.series.get(name).put(event.step, value);
    }
    if (Object.keys(event.bins).length) this.bins = { step: event.step, bins: event.bins };
  }

  addEvent(event) {
    event.mark = markOf(event);
    this.events.push(event);
  }

  async thin() {
    if (this.thinning) return;
    this.thinning = true;
    try {
      const until = this.sequence;
      const found = await this.again(() => get(`${this.path}/metrics`, this.signal));
      if (!found) return;
      const { series } = found;
      const newer = this.series;
      this.series = new Map(series.map((one) => [one.name, new Series(one)]));
      // What came while the server was thinning is newer than its answer, or in it already.
      for (const [name, one] of newer) {
        const kept = this.series.get(name);
        const from = kept?.last ? one.place(kept.last.step + 1) : 0;
        for (let at = from; kept && at < one.steps.length; at += 1) kept.put(one.steps[at], one.values[at]);
        if (!kept) this.series.set(name, one);
      }
      if (until <= this.sequence) this.soon();
    } finally {
      this.thinning = false;
    }
  }

  async refresh() {
    try {
      const { step, last_sequence: sequence } = this.job;
      const job = await get(this.path, this.signal);
      this.job = { ...job, step: Math.max(step, job.step), last_sequence: sequence };
      if (job.state !== "RUNNING") this.job.step = job.step;
      this.soon();
      this.offer();
      if (job.artifact && !this.traced) void this.readLineage(job.artifact);
    } catch (error) {
      // What it cannot tell now it tells with the next event; that the service is away is told by the board.
      if (!this.signal.aborted && !(error.status >= 500 || error instanceof TypeError)) throw error;
    }
  }

  /** Ask until there is an answer, for a service may be away for a while. Null where the page was left meanwhile. */
  async again(ask) {
    while (!this.signal.aborted) {
      try {
        return await ask();
      } catch (error) {
        if (this.signal.aborted) break;
        if (error.status < 500) {
          this.head.append(h("p", { class: "notice bad" }, error.reason ? `${error.reason}: ` : "", error.message));
          break;
        }
        await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      }
    }
    return null;
  }

  async readHistory() {
    const until = this.job.last_sequence;
    fill(this.timeline, h("p", { class: "loading" }, "Reading what happened"));
    const past = await this.again(() => get(`${this.path}/history?until=${until}`, this.signal));
    if (!past) return;
    const seen = this.events; // came by the stream meanwhile
    this.events = [];
    for (const event of past.events) if (event.sequence <= until) this.addEvent(event);
    this.events.push(...seen);
    const later = this.axis.clock;
    this.axis.clock = new Clock();
    for (const [step, at] of past.moments) this.axis.clock.put(step, at);
    later.steps.forEach((step, at) => this.axis.clock.put(step, later.times[at]));
    if (past.newest_bins.bins && !this.bins) this.bins = past.newest_bins;
    this.drawn = -1;
    this.soon();
  }

  async readCheckpoints() {
    const found = await this.again(() => get(`${this.path}/checkpoints`, this.signal));
    if (!found) return;
    const { items } = found;
    fill(
      this.checkpoints,
      table(
        "Checkpoints, newest first",
        ["Step", ["Size", "num"], ["Score", "num"], "Kept", "Digest"],
        items.slice(0, 20).map((one) => [number(one.step), bytes(one.size_bytes), one.score === undefined ? "" : number(one.score), one.pinned ? "pinned" : one.available ? "yes" : "removed", digest(one.digest)]),
        "No checkpoint yet.",
      ),
      items.length > 20 ? h("p", { class: "muted" }, `The newest 20 of ${items.length}.`) : null,
    );
  }

  async readLineage(artifact) {
    this.traced = true;
    try {
      const kind = this.service === "cognate" ? "models" : "agents";
      const found = await get(`/api/${kind}/${encodeURIComponent(artifact)}`, this.signal);
      fill(this.made, lineage(found.lineage));
    } catch (error) {
      if (this.signal.aborted) return;
      this.traced = false;
      fill(this.made, h("p", {}, artifactLink(this.service, artifact)), h("p", { class: "notice bad" }, error.message));
    }
  }

  logs() {
    const box = h("div", { class: "log", role: "log", tabindex: "0", "aria-label": "Log of the newest attempt", "aria-live": "off" });
    const note = h("p", { class: "muted", role: "status" });
    const details = h("details", { class: "card" }, h("summary", {}, h("h2", {}, "Logs")), note, box);
    let started = false;
    let place = "";
    let open = null; // a line that is not yet whole
    const add = (text, continued) => {
      open ??= { line: box.appendChild(h("div", {})), length: 0 };
      const room = LINE_LENGTH - open.length;
      if (room > 0) open.line.append(text.length > room ? `${text.slice(0, room)} …` : text);
      open.length += text.length;
      if (!continued) open = null;
      while (box.childElementCount > LOG_LINES) box.firstChild.remove();
    };
    details.addEventListener("toggle", () => {
      if (!details.open || started) return;
      started = true;
      note.textContent = "Reading";
      follow(
        () => `${this.path}/logs?${place}`,
        {
          lines: (parts) => {
            const low = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
            for (const part of parts) {
              place = `attempt=${part.attempt}&position=${part.next_position}`;
              note.textContent = `Attempt ${part.attempt}; the newest ${number(LOG_LINES)} lines`;
              if (part.missing_bytes) add(`… ${bytes(part.missing_bytes)} are no longer kept …`, false);
              for (const [text, continued] of part.lines ?? []) add(text, continued);
            }
            if (low) box.scrollTop = box.scrollHeight;
          },
          end: (_, stop) => {
            stop();
            note.textContent = box.childElementCount ? "The job has ended: this is all of it that is kept." : "Nothing was written.";
          },
          refused: (error, stop) => {
            stop();
            note.textContent = `${error.reason}: ${error.message}`;
          },
        },
        { signal: this.signal },
      );
    });
    return details;
  }

  // --- what can be done

  async actions() {
    this.may = (await about()).actions;
    this.offer();
  }

  offer() {
    if (!this.may) return;
    const { state } = this.job;
    const fits = { pause: ["QUEUED", "PREPARING", "RUNNING", "RECOVERING"], resume: ["PAUSED"], cancel: ["QUEUED", "PREPARING", "RUNNING", "RECOVERING", "PAUSED"] };
    const verbs = Object.keys(VERBS).filter((verb) => fits[verb].includes(state));
    if (verbs.join() === this.offered) return;
    this.offered = verbs.join();
    fill(this.buttons, verbs.map((verb) => h("button", { type: "button", class: verb === "cancel" ? "danger" : "", onclick: () => this.confirm(verb) }, VERBS[verb])));
  }

  confirm(verb) {
    const act = wish(`${this.path}/${verb}`);
    const told = h("p", { class: "notice bad", role: "alert", hidden: true });
    const what = { pause: "Its worker saves a checkpoint and lets go.", resume: "It waits for a place, and goes on from its checkpoint.", cancel: "It ends without an artifact. This cannot be undone." }[verb];
    const sure = h("button", { type: "button", class: verb === "cancel" ? "danger" : "primary" }, `${VERBS[verb]} the job`);
    const dialog = h("dialog", { "aria-labelledby": "sure" }, h("h2", { id: "sure" }, `${VERBS[verb]} job ${this.id.slice(0, 8)}?`), h("p", {}, what), told, h("div", { class: "actions" }, h("button", { type: "button", onclick: () => dialog.close() }, "Leave it"), sure));
    sure.addEventListener("click", async () => {
      sure.disabled = true;
      try {
        await act();
        dialog.close();
        await this.refresh();
      } catch (error) {
        told.hidden = false;
        const fields = (error.violations ?? []).map((one) => ` ${one.field}: ${one.description}`).join(";");
        told.textContent = `${error.reason ? `${error.reason}: ` : ""}${error.message}${fields}`;
        sure.disabled = false;
      }
    });
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }
}

function stepOf(event) {
  if (event.kind === "checkpoint") return event.step;
  const told = Number.parseInt(event.facts?.step, 10);
  return Number.isNaN(told) ? null : told;
}

function markOf(event) {
  if (event.kind === "note") return event.note === "recovery" ? "recovery" : null;
  if (event.kind === "state_change") return event.to === "RECOVERING" ? "recovery" : "state";
  return { attempt_started: "attempt", checkpoint: "checkpoint", artifact_published: "published" }[event.kind] ?? null;
}

function tell(event, service) {
  switch (event.kind) {
    case "state_change":
      return [h("b", {}, title(event.to)), event.message ? `: ${event.message}` : ""];
    case "attempt_started":
      return [h("b", {}, `Attempt ${event.attempt}`), ` on ${event.engine}`];
    case "checkpoint":
      return [h("b", {}, "Checkpoint"), ` of ${bytes(event.size_bytes)}`];
    case "artifact_published":
      return [h("b", {}, "Published "), artifactLink(service, event.name)];
    case "note":
      return [h("b", {}, title(event.note)), `: ${event.message}`];
    default:
      return "Something of a kind that this release does not know";
  }
}

/** A recovery's evidence, parameters before and after, and what is left of the budget. */
function recovered(event) {
  if (event.note !== "recovery" || !event.facts) return null;
  const { evidence, before, after, budget_left: left, budget_left_in_all: inAll } = event.facts;
  return h(
    "details",
    {},
    h("summary", {}, "Evidence and budget"),
    facts([
      ["Evidence", evidence ? h("code", {}, evidence) : ""],
      ["Before", before && before !== "{}" ? h("code", {}, before) : ""],
      ["After", after && after !== "{}" ? h("code", {}, after) : ""],
      ["Left of this action", left],
      ["Left in all", inAll],
    ]),
  );
}

function planFacts(job) {
  const flat = (value, prefix) =>
    Object.entries(value).flatMap(([name, item]) => {
      if (item && typeof item === "object" && !Array.isArray(item)) return flat(item, `${prefix}${name}.`);
      const text = Array.isArray(item) ? item.map((one) => (typeof one === "object" ? JSON.stringify(one) : one)).join(", ") : item;
      return [[`${prefix}${name}`, typeof text === "number" ? number(text) : String(text)]];
    });
  const pairs = flat(job.plan, "").filter(([, text]) => text !== "" && text !== "0" && text !== "false");
  return h("details", {}, h("summary", {}, `${pairs.length} settings`), facts(pairs));
}

