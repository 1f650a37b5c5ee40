# make test is all that a fresh Debian machine with Go needs; see CONTRIBUTING.
#
#   build         bin/lmctl, one static binary
#   test          everything below that judges: deps, lint, unit, e2e, libvirt, package
#   lint          gofmt, go mod tidy, go vet, staticcheck, shellcheck
#   unit          all packages with the race detector, fuzz seeds included
#   e2e           whole migrations between agents, with failpoints
#   libvirt       the same between two libvirtd's, with domains of many shapes
#   fuzz-seeds    only the seeds of the fuzz tests
#   fuzz          every fuzz test for FUZZTIME (10s)
#   demo          a Linux guest moves to another host and back
#   demo-libvirt  the same between two libvirtd's
#   bench         the quick comparison with QEMU's own migration
#   bench-libvirt the comparison with virsh migrate
#   docs          manual pages and shell completion, below dist/
#   install       what was built, below PREFIX (/usr/local) and DESTDIR
#   uninstall     removes that again; configuration stays
#   deb           a Debian package, in dist/
#   package       builds, installs and purges the package in a Debian root
#   proto         generate the API's Go code (needs protobuf-compiler)
#   install-deps  install what building and testing take
#   qemu10        a QEMU 10, unpacked into the cache, for the tests
#   libvirt11     a libvirt 11, likewise
#   clean

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := build
.PHONY: build init test lint unit e2e libvirt fuzz fuzz-seeds demo demo-libvirt bench bench-libvirt proto \
	docs install uninstall deb package \
	install-deps install-run-deps install-libvirt-deps need-root qemu10 libvirt11 clean

export PATH := $(PATH):/usr/local/go/bin:/usr/sbin:/sbin

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# The version goes in by itself: a checkout that git distrusts builds all the same.
export GOFLAGS := $(GOFLAGS) -buildvcs=false

# What is built of one revision is the same whenever it is built.
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
export DESTDIR PREFIX

LDFLAGS = -s -w -X main.version=$(VERSION)
STATICCHECK = go tool -modfile=tools/go.mod staticcheck
REPORT = go run ./test/report
TEST_LOG = dist/tests.jsonl
FUZZTIME ?= 10s
UNIT_TIMEOUT ?= 10m
E2E_TIMEOUT ?= 14m
LIBVIRT_TIMEOUT ?= 8m
PACKAGE_TIMEOUT ?= 5m
E2E = ./test/e2e/...
LIBVIRT_DEPS = libvirt-daemon-system libvirt-clients

# What is not root asks sudo: for packages, for the lab, and, if sudo needs no
# password, for the tests that want root.
ifeq ($(shell id -u),0)
export LMCTL_CACHE ?= /var/cache/lmctl
else
export LMCTL_CACHE ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/lmctl
SUDO = sudo
ifeq ($(shell sudo -n true 2>/dev/null && echo yes),yes)
AS_ROOT = -exec 'sudo -E env "PATH=$(PATH)"'
endif
endif

build: init
	CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)' -o bin/lmctl ./cmd/lmctl

# The init of Linux guests, which bin/lmctl has in it.
init:
	CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o guest/linux/payload/init ./guest/init

# One part that fails does not keep the others from saying what they know.
test: install-deps qemu10 libvirt11 init
	@rm -f $(TEST_LOG); failed=; \
	for part in lint unit e2e libvirt package; do \
		$(MAKE) --no-print-directory $$part || failed="$$failed $$part"; \
	done; \
	$(REPORT) summary $(TEST_LOG) || failed="$$failed summary"; \
	if [ -n "$$failed" ]; then echo "make test: failed:$$failed" >&2; exit 1; fi

lint:
	@unformatted=$$(gofmt -l .); \
	if [ -n "$$unformatted" ]; then printf 'gofmt -w is wanted for:\n%s\n' "$$unformatted"; exit 1; fi
	go mod tidy -diff
	go vet ./...
	go vet -tags failpoint ./...
	$(STATICCHECK) ./...
	$(STATICCHECK) -tags failpoint ./...
	go vet -tags man ./cmd/lmctl
	shellcheck scripts/* .ci/run packaging/install packaging/build-deb packaging/debian/p* \
		test/package/testdata/boot vagrant/make-keys vagrant/provision.sh

unit:
	$(REPORT) run -log $(TEST_LOG) -- -race $(if $(CI),-count=1) -timeout $(UNIT_TIMEOUT) $(AS_ROOT) \
		$$(go list ./... | grep -v -e '/test/e2e' -e /test/libvirt -e /test/conformance -e /test/package)

e2e: init
	@if [ -d test/e2e ]; then set -x; \
		$(REPORT) run -log $(TEST_LOG) -- -tags failpoint -count=1 -timeout $(E2E_TIMEOUT) $(AS_ROOT) $(E2E); \
	fi

libvirt:
	$(REPORT) run -log $(TEST_LOG) -- -p 1 -count=1 -timeout $(LIBVIRT_TIMEOUT) $(AS_ROOT) ./test/libvirt ./test/conformance

fuzz-seeds:
	go test -run '^Fuzz' ./...

fuzz:
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' "$$package" | grep '^Fuzz' || true); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package"; \
		done; \
	done

demo: need-root install-run-deps build
	$(SUDO) env "LMCTL_CACHE=$(LMCTL_CACHE)" bin/lmctl lab demo

demo-libvirt: need-root install-libvirt-deps build
	$(SUDO) env "LMCTL_CACHE=$(LMCTL_CACHE)" bin/lmctl lab demo --hypervisor libvirt

bench: need-root install-run-deps build
	$(SUDO) env "LMCTL_CACHE=$(LMCTL_CACHE)" bin/lmctl bench quick

bench-libvirt: need-root install-libvirt-deps build
	$(SUDO) env "LMCTL_CACHE=$(LMCTL_CACHE)" bin/lmctl bench libvirt

need-root:
	@[ "$$(id -u)" -eq 0 ] || command -v sudo >/dev/null || \
		{ echo "the lab's hosts are network namespaces: run make as root, or install sudo" >&2; exit 1; }

docs: build
	rm -rf dist/man dist/completion && mkdir -p dist/man dist/completion
	go run -tags man -ldflags '$(LDFLAGS)' ./cmd/lmctl dist/man
	for shell in bash zsh fish; do bin/lmctl completion $$shell >dist/completion/$$shell; done

install: docs
	packaging/install install

uninstall:
	packaging/install uninstall

deb: docs
	rm -f dist/lmctl_*.deb
	packaging/build-deb '$(VERSION)' dist

package: deb
	@$(SUDO) env "LMCTL_CACHE=$(LMCTL_CACHE)" scripts/debian-root
	$(REPORT) run -log $(TEST_LOG) -- -count=1 -timeout $(PACKAGE_TIMEOUT) $(AS_ROOT) ./test/package

proto:
	@command -v protoc >/dev/null || { echo "make proto needs protoc: install protobuf-compiler" >&2; exit 1; }
	PATH="$$(dirname "$$(go tool -modfile=tools/go.mod -n protoc-gen-go)"):$$(dirname "$$(go tool -modfile=tools/go.mod -n protoc-gen-go-grpc)"):$$PATH" \
		go generate ./internal/api

install-run-deps:
	@scripts/install-deps

install-libvirt-deps:
	@scripts/install-deps $(LIBVIRT_DEPS)

install-deps:
	@scripts/install-deps gcc libc6-dev shellcheck debootstrap man-db vagrant vagrant-libvirt $(LIBVIRT_DEPS) ovmf

qemu10:
	@scripts/fetch-qemu10

libvirt11:
	@scripts/fetch-libvirt11

clean:
	rm -rf bin dist guest/linux/payload/init
