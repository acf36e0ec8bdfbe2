// SPDX-License-Identifier: MIT
//
// The experiments, in the order of the report.

import * as backward from './backward.mjs';
import * as entries from './entries.mjs';
import * as forward from './forward.mjs';
import * as frontier from './frontier.mjs';
import * as rank from './rank.mjs';
import * as routes from './routes.mjs';
import * as stability from './stability.mjs';

export const EXPERIMENTS = { forward, rank, backward, entries, stability, frontier, routes };
