// Uses a part that needs no WebAssembly.

import { theory } from 'rope-attention';

console.log(theory.rank(16, 3));
