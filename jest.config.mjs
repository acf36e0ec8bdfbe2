export default {
  testEnvironment: 'node',
  roots: ['<rootDir>/tests'],
  testMatch: ['**/*.test.ts'],
  transform: { '\\.ts$|/(dist|tests)/.*\\.m?js$': '<rootDir>/scripts/jest-transform.mjs' },
  extensionsToTreatAsEsm: ['.ts'],
  // In TypeScript the sources say './x.js' and mean x.ts
  moduleNameMapper: { '^(\\.{1,2}/.*)\\.js$': ['$1.ts', '$1.js'] },
  // Two cores are what continuous integration has; timings within a test stay meaningful
  maxWorkers: 2,
  testTimeout: 60_000,
  cacheDirectory: '<rootDir>/build/jest-cache',
};
