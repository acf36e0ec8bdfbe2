// A worker script of one's own, for the url option.

import 'rope-attention/worker';
