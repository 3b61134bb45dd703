"use strict";
// Keeps a job's page current: asks the server once a second while the job is open and the page is visible.
function followJob() {
  const panel = document.getElementById("job-progress");
  if (!panel) { return; }
  const bar = panel.querySelector("progress");
  const state = panel.querySelector("[data-state]");
  const message = panel.querySelector("[data-message]");
  const left = panel.querySelector("[data-left]");
  const log = panel.querySelector("[data-log]");
  const result = panel.querySelector("[data-result]");
  const failure = panel.querySelector("[data-error]");
  const notice = panel.querySelector("[data-notice]");
  const cancel = document.getElementById("job-cancel");
  const openAtStart = panel.dataset.open === "yes";
  let lastLine = 0;

  function show(answer) {
    state.textContent = answer.state_label;
    bar.max = answer.total || 1;
    bar.value = answer.terminal && answer.state === "SUCCEEDED" ? bar.max : answer.done;
    message.textContent = answer.total ? answer.done + " / " + answer.total + "  " + answer.message : answer.message;
    left.textContent = answer.left_label;
    notice.textContent = answer.notice;
    failure.textContent = answer.error_message;
    for (const line of answer.log) {
      const item = document.createElement("li");
      item.textContent = line.at + "  " + line.message;
      log.append(item);
      lastLine = line.id;
    }
    if (answer.result) { result.textContent = JSON.stringify(answer.result, null, 2); }
    if (answer.terminal && cancel) { cancel.hidden = true; }
  }

  async function ask() {
    let pause = 1000;
    if (!document.hidden) {
      try {
        const response = await fetch(panel.dataset.url + "?after=" + lastLine, { credentials: "same-origin", headers: { "Accept": "application/json" } });
        if (response.redirected || response.status === 403) {
          notice.textContent = panel.dataset.signedOut;
          return;
        }
        const answer = await response.json();
        show(answer);
        if (answer.terminal) {
          if (openAtStart) { window.location.reload(); } // the facts below the panel are of the time it was opened
          return;
        }
      } catch {
        notice.textContent = panel.dataset.unreachable;
        pause = 5000;
      }
    }
    window.setTimeout(ask, pause);
  }
  ask();
}

if (document.readyState === "loading") {
  document.addEventListener("DOMContentLoaded", followJob);
} else {
  followJob();
}
