// SPDX-License-Identifier: MIT
//
// The worker, where worker-client.ts finds it by path. By name it is the package's export ./worker.js; see openWorker there.

import '../worker.js';
