// Both services at a glance: are they there, what runs, what waits, what is wrong.

import { fill, h, section, table } from "../dom.js";
import { number, time, title } from "../format.js";
import { badge, capacity, jobTable } from "../parts.js";

const NAMES = { cognate: "Cognate pretraining", agent: "Agent training" };
// From what runs to what is over.
const ORDER = ["RUNNING", "PREPARING", "VALIDATING", "RECOVERING", "PAUSING", "CANCELLING", "PAUSED", "QUEUED", "SUCCEEDED", "FAILED", "CANCELLED"];
const MAIN = ["RUNNING", "QUEUED", "SUCCEEDED", "FAILED"];

export async function render({ main, onBoard, signal }) {
  const body = h("div", { class: "stack" }, h("p", { class: "loading" }, "Asking both services"));
  fill(main, h("h1", {}, "Overview"), body);
  onBoard((seen) => {
    const running = seen.services.flatMap((service) => service.open ?? []);
    const newest = seen.services.flatMap((service) => service.newest ?? []).sort((a, b) => b.create_time - a.create_time);
    // What has the focus is drawn anew with the rest: it goes to the same place.
    const focused = document.activeElement?.closest?.("a[href]")?.getAttribute("href");
    fill(
      body,
      h("div", { class: "pair" }, seen.services.map((service) => view(service, seen))),
      section("Running now", jobTable("Running jobs", running, { empty: "No job has a worker now." })),
      section("Newest jobs", jobTable("Newest jobs", newest.slice(0, 10), { empty: "No job was submitted yet: forge pretrain starts one." })),
    );
    if (focused && !document.activeElement?.closest?.("#main a")) {
      if (document.activeElement === document.body) body.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
    }
  }, signal);
}

function view(service, seen) {
  const away = service.health === "AWAY";
  const alerts = (seen.alerts ?? []).filter((alert) => alert.service === service.service);
  const id = `view-${service.service}`;
  return h(
    "section",
    { class: "card service", "aria-labelledby": id },
    h("div", { class: "head" }, h("h2", { id }, NAMES[service.service]), badge(service.health)),
    h("p", { class: "muted" }, service.addresses.join(", "), service.info ? ` · version ${service.info.version}` : ""),
    away
      ? h("p", { class: "notice bad" }, "No answer since ", time(service.away_since), `: ${service.error.message}`)
      : [counts(service), slots(service, seen), circuits(service.info.peers), damaged(service.info.damaged_artifacts)],
    alerts.length
      ? h("p", { class: "line" }, h("a", { href: "/alerts" }, `${alerts.length} ${alerts.length === 1 ? "alert" : "alerts"}`), `: ${alerts[0].summary}`)
      : null,
  );
}

function counts(service) {
  const { states } = service;
  const link = (state) => `/jobs?service=${service.service}&state=${state}`;
  const others = ORDER.filter((state) => states[state] && !MAIN.includes(state));
  return [
    h("ul", { class: "counts", "aria-label": "Jobs by state" }, MAIN.map((state) => h("li", {}, h("a", { href: link(state) }, h("b", {}, number(states[state] ?? 0)), h("span", {}, title(state)))))),
    others.length ? h("p", { class: "line muted" }, others.map((state, at) => [at ? " · " : "", h("a", { href: link(state) }, `${number(states[state])} ${title(state).toLowerCase()}`)])) : null,
    service.more_jobs ? h("p", { class: "line muted" }, "There are more jobs than are counted here.") : null,
  ];
}

function slots(service, seen) {
  if (service.service !== "cognate" || !seen.capacities.length) return null;
  return h("div", { class: "meters" }, seen.capacities.map(capacity));
}

function circuits(peers) {
  return peers.length
    ? table(
        "Circuits to other services",
        ["Circuit to", "State", ["Failed", "num"], ["Held back", "num"]],
        peers.map((peer) => [peer.name, badge(peer.circuit), `${number(peer.failed)} of ${number(peer.admitted)}`, number(peer.refused)]),
      )
    : null;
}

function damaged(count) {
  return count
    ? h("p", { class: "notice bad" }, `${number(count)} published ${count === 1 ? "version is" : "versions are"} damaged: forge artifacts verify names the files.`)
    : h("p", { class: "line muted" }, "No published version is damaged.");
}
