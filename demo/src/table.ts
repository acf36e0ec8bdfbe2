// SPDX-License-Identifier: MIT
//
// The points of a figure as a table.

import type { Dataset } from './dataset.js';
import { duration, errorText, integer } from './format.js';
import type { Panel } from './state.js';

function rowsOf(panel: Panel, dataset: Dataset): { head: string[]; body: string[][] } {
  if (panel === 'time') {
    return {
      head: ['Method', 'N', 'Forward', 'Backward', 'Source'],
      body: dataset
        .times()
        .map((p) => [p.degree === null ? 'exact' : `degree ${p.degree}`, integer(p.length), duration(p.forward), duration(p.backward), p.source]),
    };
  }
  const points = panel === 'length' ? dataset.byLength() : dataset.byBound();
  return {
    head: ['Degree', panel === 'length' ? 'N' : 'B', 'Output', 'Certified', 'dq', 'dk', 'dv', 'Source'],
    body: points.map((p) => [
      String(p.degree),
      panel === 'length' ? integer(p.length) : String(p.entryBound),
      ...[p.output, p.certified, p.dq, p.dk, p.dv].map(errorText),
      p.source,
    ]),
  };
}

export function fillTable(box: HTMLElement, panel: Panel, dataset: Dataset): void {
  const { head, body } = rowsOf(panel, dataset);
  const table = document.createElement('table');
  const headRow = table.createTHead().insertRow();
  for (const text of head) {
    const cell = document.createElement('th');
    cell.scope = 'col';
    cell.textContent = text;
    headRow.append(cell);
  }
  const bodyPart = table.createTBody();
  for (const texts of body) {
    const row = bodyPart.insertRow();
    for (const text of texts) row.insertCell().textContent = text;
  }
  box.replaceChildren(table);
}
