// Numbers, moments and names for people.

export function number(value) {
  if (typeof value === "string") return value; // "nan", "inf": JSON has no such numbers
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace(/\.?0+e/, "e");
  return value.toPrecision(4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  let left = Number(value);
  while (left >= 1024 && at < units.length - 1) {
    left /= 1024;
    at += 1;
  }
  return `${at ? left.toPrecision(3) : left} ${units[at]}`;
}

/** What a metric's value is in, with the unit where it has one. */
export function measured(value, unit) {
  if (unit === "bytes" && typeof value === "number") return bytes(value);
  if (unit === "s" && typeof value === "number") return span(value);
  return unit && unit !== "1" ? `${number(value)} ${unit}` : number(value);
}

export function span(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor((whole % 86400) / 3600)} h`;
}

/** Seconds since 1970, or RFC 3339, as a date. */
export function date(moment) {
  return new Date(typeof moment === "number" ? moment * 1000 : moment);
}

/** A moment as a <time>: the hour of today, otherwise the day too. */
export function time(moment) {
  if (!moment) return "";
  const when = date(moment);
  const element = document.createElement("time");
  element.dateTime = when.toISOString();
  element.title = when.toLocaleString();
  const today = when.toDateString() === new Date().toDateString();
  element.textContent = today
    ? when.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" })
    : when.toLocaleString([], { month: "short", day: "numeric", hour: "2-digit", minute: "2-digit" });
  return element;
}

export function short(digest) {
  return digest ? digest.replace(/^sha256:/, "").slice(0, 12) : "";
}

export function words(name) {
  return name.replace(/_/g, " ");
}

/** JOB_STATE words as people read them: "Succeeded". */
export function title(word) {
  const text = words(word).toLowerCase();
  return text.charAt(0).toUpperCase() + text.slice(1);
}
