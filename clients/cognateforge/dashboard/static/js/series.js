// A metric over steps, as the server thinned it, and what a stream adds to it.

/** Points of one metric, steps ascending; of two values at a step the newer one counts. */
export class Series {
  constructor({ name, unit, steps = [], values = [] }) {
    this.name = name;
    this.unit = unit;
    this.steps = steps;
    this.values = values;
  }

  put(step, value) {
    const last = this.steps.length - 1;
    if (last < 0 || step > this.steps[last]) {
      this.steps.push(step);
      this.values.push(value);
      return;
    }
    const at = this.place(step);
    if (this.steps[at] === step) this.values[at] = value;
    else {
      this.steps.splice(at, 0, step);
      this.values.splice(at, 0, value);
    }
  }

  /** Where a step is, or would be. */
  place(step) {
    let low = 0;
    let high = this.steps.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  get last() {
    return this.values.length ? { step: this.steps.at(-1), value: this.values.at(-1) } : null;
  }
}

/** Steps as times: what was told with progress, and straight lines between. */
export class Clock {
  constructor() {
    this.steps = [];
    this.times = [];
  }

  put(step, time) {
    // Steps that are trained again are drawn at the time of the later try.
    while (this.steps.length && this.steps.at(-1) >= step) {
      this.steps.pop();
      this.times.pop();
    }
    this.steps.push(step);
    this.times.push(time);
  }

  at(step) {
    const { steps, times } = this;
    if (!steps.length) return null;
    let at = steps.findIndex((one) => one >= step);
    if (at === 0) return times[0];
    if (at < 0) return times.at(-1);
    const share = (step - steps[at - 1]) / (steps[at] - steps[at - 1]);
    return times[at - 1] + share * (times[at] - times[at - 1]);
  }

  /** All of a series' steps in one pass, for both ascend. */
  map(wanted) {
    const { steps, times } = this;
    if (!steps.length) return wanted.map(() => null);
    let at = 0;
    return wanted.map((step) => {
      while (at < steps.length && steps[at] < step) at += 1;
      if (at === 0) return times[0];
      if (at === steps.length) return times.at(-1);
      const share = (step - steps[at - 1]) / (steps[at] - steps[at - 1]);
      return times[at - 1] + share * (times[at] - times[at - 1]);
    });
  }
}
