// What is wrong now, by the conditions that the notifier and the rules for Prometheus know too.

import { fill, h, section, table } from "../dom.js";
import { words } from "../format.js";
import { ago, badge, jobLink, SERVICE } from "../parts.js";

export async function render({ main, onBoard, signal }) {
  const body = h("div", { class: "stack" }, h("p", { class: "loading" }, "Looking at both services"));
  fill(main, h("h1", {}, "Alerts"), body);
  onBoard((seen) => {
    if (seen.alerts === undefined) return;
    const unknown = seen.unknown.map((service) => SERVICE[service]).join(" and ");
    fill(
      body,
      seen.alerts_error ? h("p", { class: "notice bad" }, `${seen.alerts_error.reason}: ${seen.alerts_error.message}`) : null,
      unknown ? h("p", { class: "notice" }, `Not known of ${unknown}: it could not be asked.`) : null,
      section(
        "Active",
        table(
          "Active alerts",
          ["Alert", "Severity", "Service", "What", "Where", "Since", "Runbook"],
          seen.alerts.map((one) => [one.name.replace(/^Forge/, "").replace(/(?<=[a-z])(?=[A-Z])/g, " "), badge(one.severity), SERVICE[one.service], h("span", { class: "prose-cell" }, one.summary), where(one), ago(one.since), h("code", {}, one.runbook)]),
          "Nothing is wrong.",
        ),
      ),
    );
  }, signal);
}

function where(alert) {
  return Object.entries(alert.labels).map(([name, value]) => {
    const id = value.replace(/^jobs\//, "");
    return h("div", {}, name === "job" && /^[0-9a-f-]{36}$/.test(id) ? ["job ", jobLink(alert.service, id)] : `${words(name)} ${value}`);
  });
}
