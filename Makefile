# vddkcp. CONTRIBUTING.md says how the house is laid out.
GO         ?= go
PREFIX     ?= /usr/local
VERSION    ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
STATICCHECK = honnef.co/go/tools/cmd/staticcheck@v0.8.2
GOVULNCHECK = golang.org/x/vuln/cmd/govulncheck@v1.9.0
FUZZTIME   ?= 20s
FUZZLONG   ?= 1h

# One static binary: no C library, any Linux.
export CGO_ENABLED = 0

.PHONY: build testlib quick test test-race guests chaos fuzz fuzz-long bench lint vuln demo install clean

build: bin/vddkcp

# The program that loads VDDK, embedded in bin/vddkcp. VDDK is for x86-64 alone.
WORKER = $(if $(filter x86_64,$(shell uname -m)),vddk/worker/bin/vddkcp-vddk-worker)
vddk/worker/bin/vddkcp-vddk-worker: vddk/worker/build $(wildcard vddk/worker/program/*)
	vddk/worker/build $@

# Go knows best what is out of date.
.PHONY: bin/vddkcp
bin/vddkcp: $(WORKER)
	$(GO) build -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o $@ ./cmd/vddkcp

# A stand-in for VMware's library: vddk/testlib/README.md.
testlib:
	./scripts/need gcc
	./vddk/testlib/build bin/testlib

# The tests that need no other program and no root: under two minutes.
quick:
	VDDKCP_CHAOS=0 $(GO) test -short ./...

test:
	./scripts/need gcc qemu-img qemu-io mke2fs mkfs.xfs mkfs.btrfs time qemu-nbd nbdkit nbdcopy nbd-client nbd-server vmdkinfo openssl
	$(GO) test -timeout 40m ./...

# The race detector needs cgo. Chaos, guests and clusters, which run programs that
# are built without it, are make test's.
test-race:
	CGO_ENABLED=1 VDDKCP_CHAOS=0 $(GO) test -race -timeout 60m -skip '^(TestExample(BootCheck|V2V|Slurm|KubernetesRuns)|TestGuestWritesToCowFile)$$' ./...

# libguestfs and virt-v2v against exports: a quarter of an hour without KVM.
guests: build
	./scripts/guests $(GUEST)

# A hundred copies of 2 GiB that are killed again and again: about three hours.
chaos:
	VDDKCP_CHAOS=$${VDDKCP_CHAOS:-100} VDDKCP_CHAOS_SIZE=$${VDDKCP_CHAOS_SIZE:-2147483648} \
		$(GO) test -timeout 6h -run Chaos -v ./cmd/vddkcp

# Every fuzz target for FUZZTIME, after a look at its committed seeds.
fuzz:
	FUZZTIME=$(FUZZTIME) ./scripts/fuzz

# Damaged qcow2 images, which qemu-img must not read otherwise than we do, and
# every fuzz target, for FUZZLONG each.
fuzz-long:
	./scripts/need qemu-img qemu-io
	VDDKCP_REFEREE=$(FUZZLONG) $(GO) test -timeout 0 -run TestReferee -v ./source/qcow2
	FUZZTIME=$(FUZZLONG) ./scripts/fuzz

lint:
	test -z "$$(gofmt -l .)" || { gofmt -d .; exit 1; }
	$(GO) vet ./...
	$(GO) run $(STATICCHECK) ./...
	$(GO) mod tidy -diff
	$(GO) -C testtools vet ./...
	$(GO) -C testtools mod tidy -diff

# Needs the vulnerability database, which is not everywhere.
vuln:
	$(GO) run $(GOVULNCHECK) ./...

demo: build
	./scripts/need qemu-img mke2fs
	./scripts/demo

bench: build
	./scripts/need qemu-img qemu-nbd nbdkit nbdcopy mke2fs time
	./scripts/bench

install: build
	install -D -m 755 bin/vddkcp $(DESTDIR)$(PREFIX)/bin/vddkcp

clean:
	rm -rf bin bench-out vddk/worker/bin/vddkcp-vddk-worker
