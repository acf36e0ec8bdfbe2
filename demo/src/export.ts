// SPDX-License-Identifier: MIT
//
// Figures as files. The drawing on the page takes its colours from the style sheet; a file has to carry them.

const SVG = 'http://www.w3.org/2000/svg';
const MARGIN = 20;
const HEAD = 30;
const SIZE = 12;
const LEADING = 17;

export interface Sheet {
  readonly text: string;
  readonly width: number;
  readonly height: number;
}

function line(content: string, x: number, y: number, size: number, weight = 'normal'): SVGTextElement {
  const element = document.createElementNS(SVG, 'text');
  const attributes = { x, y, 'font-size': size, 'font-weight': weight, 'font-family': 'var(--sans)', fill: 'var(--ink)' };
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, String(value));
  element.textContent = content;
  return element;
}

/** Lines of at most so many pixels, by the width that letters have on average. */
function wrap(text: string, pixels: number): string[] {
  const letters = Math.floor(pixels / (0.58 * SIZE));
  const lines: string[] = [];
  let current = '';
  for (const word of text.split(' ')) {
    if (current !== '' && current.length + 1 + word.length > letters) {
      lines.push(current);
      current = word;
    } else current = current === '' ? word : `${current} ${word}`;
  }
  return [...lines, current];
}

/** The drawing with a title above and paragraphs below, in the colours of the page as they are now. */
export function toSheet(drawing: SVGSVGElement, title: string, below: readonly string[]): Sheet {
  const [innerWidth, innerHeight] = ['width', 'height'].map((name) => Number(drawing.getAttribute(name)));
  const lines = below.flatMap((paragraph) => wrap(paragraph, innerWidth!));
  const width = innerWidth! + 2 * MARGIN;
  const height = innerHeight! + 2 * MARGIN + HEAD + LEADING * (lines.length + 0.5);
  const inner = drawing.cloneNode(true) as SVGSVGElement;
  inner.setAttribute('x', String(MARGIN));
  inner.setAttribute('y', String(MARGIN + HEAD));
  const sheet = document.createElementNS(SVG, 'svg');
  sheet.setAttribute('xmlns', SVG);
  sheet.setAttribute('width', String(width));
  sheet.setAttribute('height', String(height));
  sheet.setAttribute('viewBox', `0 0 ${width} ${height}`);
  const paper = document.createElementNS(SVG, 'rect');
  paper.setAttribute('width', String(width));
  paper.setAttribute('height', String(height));
  paper.setAttribute('fill', 'var(--paper)');
  sheet.append(paper, line(title, MARGIN, MARGIN + 14, 16, '600'), inner);
  const first = MARGIN + HEAD + innerHeight! + 1.5 * LEADING;
  lines.forEach((content, i) => sheet.append(line(content, MARGIN, first + LEADING * i, SIZE)));
  const style = getComputedStyle(document.documentElement);
  const text = new XMLSerializer()
    .serializeToString(sheet)
    .replace(/var\((--[\w-]+)\)/g, (_, name: string) => style.getPropertyValue(name).trim().replaceAll('"', "'"));
  return { text, width, height };
}

export const toSvg = (sheet: Sheet): Blob => new Blob([sheet.text], { type: 'image/svg+xml' });

/** At twice the size, for dense screens. */
export async function toPng(sheet: Sheet): Promise<Blob> {
  const url = URL.createObjectURL(toSvg(sheet));
  try {
    const image = new Image();
    image.src = url;
    await image.decode();
    const canvas = document.createElement('canvas');
    canvas.width = 2 * sheet.width;
    canvas.height = 2 * sheet.height;
    canvas.getContext('2d')!.drawImage(image, 0, 0, canvas.width, canvas.height);
    return await new Promise((resolve, reject) => {
      canvas.toBlob((blob) => (blob ? resolve(blob) : reject(new Error('toPng: the browser made no image'))), 'image/png');
    });
  } finally {
    URL.revokeObjectURL(url);
  }
}

export function download(blob: Blob, name: string): void {
  const link = document.createElement('a');
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
