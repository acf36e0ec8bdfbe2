# Everything is built, tested and shown from here; `make help` lists how. Needed tools are found or, on Debian as root,
# installed by scripts/toolchain.sh, each when it is first needed. Built files go to build/ (intermediate), dist/ (the
# package) and web/generated/ (the binaries as text).

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

NODE := node
EMCC := .toolchain/emcc
LINKOPT ?= -O2 # emcc's level at link, which is wasm-opt's; -O3 is no faster and 2 % larger
PORT ?= 8080   # of the demo
CORES := $(shell getconf _NPROCESSORS_ONLN) # what `make test` uses

# Comments after a value would leave spaces in it
LINKOPT := $(strip $(LINKOPT))
PORT := $(strip $(PORT))
CORES := $(strip $(CORES))

SOURCES := $(sort $(wildcard src/*.c))
TESTS := $(sort $(wildcard tests/native/*.c))
find = $(if $(wildcard $(1)),$(shell find $(1) -type f -not -path '*/generated/*' -not -name '.*'))

.PHONY: help
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "make %-12s %s\n", $$1, $$2 }'

# --- tools -----------------------------------------------------------------------------------------------------------

# A few milliseconds when there is nothing to do. Order-only prerequisites: these make nothing out of date by themselves.
.PHONY: tools-wasm tools-native tools-lint tools-browser
tools-wasm tools-native tools-lint tools-browser: tools-%:
	@scripts/toolchain.sh $*

node_modules/.stamp: package-lock.json .npmrc
	@echo 'npm ci'
	@npm ci --loglevel=error --no-progress </dev/null
	@touch $@

# Writes standard input to the target unless it is there already: what depends on it is rebuilt when the text changes
.PHONY: FORCE
keep = mkdir -p $(@D) && cat >$@.new && { cmp -s $@.new $@ && rm $@.new || mv $@.new $@; }

# --- WebAssembly -----------------------------------------------------------------------------------------------------

WARNINGS := -Wall -Wextra -Wpedantic -Werror
# Loops are unrolled where the source says so: the compiler's own unrolling costs a third of the size
CFLAGS := -std=c11 -O3 $(WARNINGS) -fno-fast-math -fno-math-errno -ffp-contract=off -fno-unroll-loops
# What is no kernel, and a fifth smaller so; kernels of relative maps, which lose a twentieth, and of polynomials, next to nothing
SMALL := attention sample sample_bounds sample_extremes sample_spread sample_rows sample_columns sample_lags pairs rotary stream workspace dense toeplitz terms near convolution relative relative_rows polynomial lags
# C sources of KissFFT, which src/fft.c includes; src/kissfft has the vector type that they ask for
KISSFFT := node_modules/kissfft-js/src
KISSFFT_FLAGS := -Isrc/kissfft -isystem $(KISSFFT)
TARGET_simd128 := -msimd128
TARGET_relaxed := -msimd128 -mrelaxed-simd -DRA_RELAXED

# No generated JavaScript and no imports: the loader in web/ is all there is. Functions name their own export in C. The
# stack comes first in memory, so an overflow traps instead of overwriting data. Memory grows from JavaScript only. wasm-opt
# would put kernels into their only callers, and engines compile function by function: the first calls take twice as long then.
LDFLAGS := $(LINKOPT) --no-entry -Wl,--export=__heap_base -sALLOW_MEMORY_GROWTH -sMAXIMUM_MEMORY=4GB \
  -sINITIAL_MEMORY=256KB -sSTACK_SIZE=64KB -Wl,--stack-first -sSTACK_OVERFLOW_CHECK=0 -sASSERTIONS=0 -sMALLOC=none \
  -sFILESYSTEM=0 -sBINARYEN_EXTRA_PASSES=--one-caller-inline-max-function-size=1
LIMIT := 163840 # bytes of one binary

WASM := dist/rope-attention.wasm dist/rope-attention.relaxed.wasm

# $(1) simd128 or relaxed, $(2) the file in dist/
define binary
build/$(1)/cflags: FORCE | tools-wasm
	@{ echo '$$(CFLAGS) $$(TARGET_$(1)) $$(SMALL) $$(KISSFFT_FLAGS)'; cat .toolchain/env; } | { $$(keep); }

build/$(1)/ldflags: FORCE
	@echo '$$(LDFLAGS) $$(SOURCES)' | { $$(keep); }

build/$(1)/fft.o: node_modules/.stamp $$(wildcard src/kissfft/*) # which -MMD takes for headers of the system

build/$(1)/%.o: src/%.c build/$(1)/cflags
	@echo 'emcc $$< ($(1))'
	@$$(EMCC) $$(CFLAGS) $$(if $$(filter $$*,$$(SMALL)),-Os) $$(if $$(filter $$*,fft),$$(KISSFFT_FLAGS)) $$(TARGET_$(1)) \
	  -MMD -MP -c $$< -o $$@

$(2): $$(SOURCES:src/%.c=build/$(1)/%.o) build/$(1)/ldflags scripts/check-wasm.mjs
	@echo 'link $(2)'
	@mkdir -p dist
	@$$(EMCC) $$(TARGET_$(1)) $$(LDFLAGS) $$(filter %.o,$$^) -o build/$(1)/linked.wasm
	@$$(NODE) scripts/check-wasm.mjs build/$(1)/linked.wasm $$(LIMIT)
	@install -m 644 build/$(1)/linked.wasm $(2)

-include $$(SOURCES:src/%.c=build/$(1)/%.d)
endef
$(eval $(call binary,simd128,dist/rope-attention.wasm))
$(eval $(call binary,relaxed,dist/rope-attention.relaxed.wasm))

# --- JavaScript ------------------------------------------------------------------------------------------------------

GENERATED := web/generated/wasm-bytes.ts

build/embed.stamp: $(WASM) scripts/embed-wasm.mjs
	@$(NODE) scripts/embed-wasm.mjs
	@touch $@

$(GENERATED): build/embed.stamp
	@test -f $@ || $(NODE) scripts/embed-wasm.mjs

build/tsc.stamp: $(GENERATED) $(filter %.ts,$(call find,web)) tsconfig.json node_modules/.stamp
	@echo 'tsc'
	@find dist \( -name '*.js' -o -name '*.d.ts' \) -delete
	@$(NODE) node_modules/typescript/bin/tsc -p tsconfig.json
	@touch $@

# What KissFFT's licence asks of whoever hands out binaries
dist/kissfft.COPYING: node_modules/.stamp
	@install -D -m 644 node_modules/kissfft-js/COPYING $@

.PHONY: build
build: build/tsc.stamp dist/kissfft.COPYING ## dist/: both binaries, JavaScript and declarations
	@test -f dist/index.js || { rm -f build/tsc.stamp; $(MAKE) build/tsc.stamp; }

build/demo/index.html: build/tsc.stamp $(call find,demo) vite.config.js
	@$(NODE) node_modules/vite/bin/vite.js build --config vite.config.js --logLevel warn
	@touch $@

.PHONY: demo page
page: build build/demo/index.html ## build/demo/: the demo page, ready for any static host

demo: page ## build the demo page and serve it on http://127.0.0.1:8080 (PORT=... for another port)
	@exec $(NODE) scripts/serve.mjs $(PORT)

# --- tests -----------------------------------------------------------------------------------------------------------

NATIVE_CFLAGS := -std=c11 -g -O1 $(WARNINGS) -Wno-unknown-pragmas -Wno-missing-field-initializers -fsanitize=address,undefined \
  -fno-sanitize-recover=all -fno-omit-frame-pointer -ffp-contract=off -Isrc

# $(1) gcc or clang
define native
build/native/$(1)/cflags: FORCE
	@echo '$$(NATIVE_CFLAGS) $$(SOURCES)' | { $$(keep); }

build/native/$(1)/src/fft.o: node_modules/.stamp $$(wildcard src/kissfft/*)

build/native/$(1)/src/%.o: src/%.c build/native/$(1)/cflags | tools-native
	@mkdir -p $$(@D)
	@$(1) $$(NATIVE_CFLAGS) $$(if $$(filter $$*,fft),$$(KISSFFT_FLAGS)) -MMD -MP -c $$< -o $$@

build/native/$(1)/tests/%.o: tests/native/%.c build/native/$(1)/cflags | tools-native
	@mkdir -p $$(@D)
	@$(1) $$(NATIVE_CFLAGS) -MMD -MP -c $$< -o $$@

build/native/$(1)/%: build/native/$(1)/tests/%.o $$(SOURCES:src/%.c=build/native/$(1)/src/%.o)
	@echo '$(1) $$@'
	@$(1) $$(NATIVE_CFLAGS) $$^ -lm -o $$@

-include $$(SOURCES:src/%.c=build/native/$(1)/src/%.d) $$(TESTS:tests/native/%.c=build/native/$(1)/tests/%.d)
endef
$(eval $(call native,gcc))
$(eval $(call native,clang))
.SECONDARY: # keeps objects that only pattern rules name

PROGRAMS := $(foreach compiler,gcc clang,$(TESTS:tests/native/%.c=build/native/$(compiler)/%))

.PHONY: test test-native test-jest
# Both parts run and are counted whatever the other does; the last line is their sum
test: ## all tests: C under sanitizers with gcc and clang, then Jest; ends with `N passed, N failed`
	@rm -f build/native.json build/jest.json build/test.txt
	@$(MAKE) -j$(CORES) --keep-going test-native test-jest || true
	@$(NODE) scripts/test-summary.mjs build/native.json build/jest.json

test-native: $(PROGRAMS) ## the C tests only
	@$(NODE) scripts/test-native.mjs build/native.json $(PROGRAMS)

test-jest: page | tools-browser ## the Jest tests only (ARGS=... goes to Jest)
	@$(NODE) scripts/jest.mjs --json --outputFile=build/jest.json $(ARGS)

.PHONY: bench
bench: build | tools-browser ## the benchmarks, tests/bench/*.mjs (BENCH=file for one, ARGS=... goes to it)
	@$(NODE) scripts/bench.mjs $(BENCH) -- $(ARGS)

# The binary that is shipped has no names
build/relaxed/named.wasm: dist/rope-attention.relaxed.wasm
	@$(EMCC) $(TARGET_relaxed) $(LDFLAGS) --profiling-funcs $(SOURCES:src/%.c=build/relaxed/%.o) -o $@

.PHONY: profile
profile: build build/relaxed/named.wasm ## where the time of calls goes, by function, and what inner loops are made of (ARGS=...)
	@$(NODE) scripts/bench.mjs tests/profile/profile.mjs -- $(ARGS)

.PHONY: bench-auto crossover sweep
bench-auto: build ## what choosing costs: time of auto over exact, two hours (ARGS=... for less)
	@$(NODE) scripts/bench.mjs tests/promise/auto.mjs -- $(ARGS)

crossover: build ## from which length on auto takes a polynomial, and how time grows with length, an hour (ARGS=... for less)
	@$(NODE) scripts/bench.mjs tests/promise/crossover.mjs -- $(ARGS)

sweep: build ## how the tolerance is kept: errors over tolerances on thousands of instances, minutes (ARGS=...)
	@$(NODE) scripts/bench.mjs tests/promise/sweep.mjs -- $(ARGS)

.PHONY: report
report: build ## build/report/: the experiments as a page and as JSON, under ten minutes (ARGS=--quick: well under one)
	@$(NODE) scripts/bench.mjs report/report.mjs -- $(ARGS)

PEERS := tests/bench/peers
$(PEERS)/node_modules/.stamp: $(PEERS)/package-lock.json $(PEERS)/.npmrc
	@echo 'npm ci ($(PEERS))'
	@cd $(PEERS) && npm ci --ignore-scripts --loglevel=error --no-progress </dev/null
	@touch $@

.PHONY: bench-peers
bench-peers: build $(PEERS)/node_modules/.stamp | tools-browser ## against other packages, an hour or more (ARGS=--quick: minutes)
	@$(NODE) $(PEERS)/bench.mjs $(ARGS)

# --- order -----------------------------------------------------------------------------------------------------------

C_FILES := $(wildcard src/*.[ch] src/kissfft/*.h tests/native/*.[ch])

.PHONY: lint format
lint: build | tools-lint ## formatting and static checks of C, ESLint, types of everything
	@clang-format --dry-run --Werror $(C_FILES)
# gcc looks for uninitialised variables in the native build, with fewer false alarms than cppcheck, which also takes arrays of
# vectors for empty ones
	@cppcheck --quiet --std=c11 --enable=warning,performance,portability --suppress=uninitvar --suppress=ctuArrayIndex --inline-suppr \
	  --error-exitcode=1 -Isrc src
	@$(NODE) node_modules/eslint/bin/eslint.js .
	@$(NODE) node_modules/typescript/bin/tsc -p tsconfig.check.json

format: | tools-lint ## format the C sources
	@clang-format -i $(C_FILES)

.PHONY: clean distclean
clean: ## remove what was built
	rm -rf build dist web/generated

distclean: clean ## remove also node_modules and the unpacked toolchain
	rm -rf node_modules $(PEERS)/node_modules .toolchain
