package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

// copyFlags are the flags of copy, by docs/cli.md.
type copyFlags struct {
	sourceFlags

	Format        string         `help:"Format of DST whatever its name: raw, qcow2 or vmdk (streamOptimized)." enum:",raw,qcow2,vmdk" default:"" placeholder:"FORMAT" group:"Target:"`
	Force         bool           `help:"Replace an existing file." group:"Target:"`
	Compress      string         `help:"Compression of the clusters of a qcow2 (none, zlib, zstd; with :LEVEL) or the grains of a VMDK (zlib)." placeholder:"METHOD[:LEVEL]" group:"Target:"`
	ClusterSize   *bytesize.Size `help:"Cluster size of a qcow2 (64KiB)." placeholder:"SIZE" group:"Target:"`
	Backing       string         `help:"Write only what differs from this disk, into a qcow2 that names it. A relative name starts from the folder of DST." placeholder:"FILE" group:"Target:"`
	BackingFormat string         `help:"Format of the backing file instead of probing it: raw, qcow2 or vmdk." enum:",raw,qcow2,vmdk" default:"" placeholder:"FORMAT" group:"Target:"`
	Preallocation string         `help:"What becomes of holes: off (sparse), falloc (reserved) or full (written)." enum:"off,falloc,full" default:"off" group:"Target:"`
	Sparse        *bytesize.Size `help:"Runs of zeros of at least this size become holes (4KiB); 0 keeps them as data." placeholder:"SIZE" group:"Target:"`
	Reflink       string         `help:"Whether to share blocks with SRC where both lie on one file system that can: auto, always (or fail) or never." enum:"auto,always,never" default:"auto" group:"Target:"`
	TargetIsZero  bool           `help:"The target reads as zeros already: holes need no writing." group:"Target:"`
	Verify        bool           `help:"Read the target back before it gets its name, and compare." group:"Target:"`
	Size          *bytesize.Size `help:"Size of the disk that comes on standard input." placeholder:"SIZE" group:"Target:"`

	RequestSize bytesize.Size `help:"Bytes to read at once (1MiB)." default:"1MiB" placeholder:"SIZE" group:"Speed:"`
	Depth       int           `help:"Reads in flight, on each connection (4)." default:"4" placeholder:"N" group:"Speed:"`
	Connections connections   `help:"Connections at once: a number, or auto: 4 to an NBD server that allows it, over VDDK as many as help, at most 4." default:"auto" placeholder:"N|auto" group:"Speed:"`
	RateLimit   rate          `help:"Most bytes to read in a second." placeholder:"BYTES/s" group:"Speed:"`
	Cache       string        `help:"Whether what is copied may stay in the page cache: keep or drop (default: drop when it is more than a quarter of the memory)." enum:",keep,drop" default:"" placeholder:"keep|drop" group:"Speed:"`

	Resume  bool   `help:"Go on with an earlier copy that stopped, where there is one." group:"Target:"`
	Journal string `help:"Where the copy notes how far it is (default: beside DST, or in the user's folder for state)." placeholder:"FILE" type:"path" group:"Target:"`

	Progress string     `help:"How to show progress: auto, bar, json or none." enum:"auto,bar,json,none" default:"auto" group:"Report:"`
	Report   string     `help:"Write a JSON report here at the end, also of a failure." placeholder:"FILE" type:"path" group:"Report:"`
	Digest   digestFlag `help:"A digest of the content into the log and the report: =blksum (default) or =sha256." group:"Report:"`
	DryRun   bool       `help:"Open everything, print the plan, copy nothing." group:"Report:"`
}

// rate is a number of bytes a second.
type rate int64

func (r *rate) UnmarshalText(text []byte) error {
	n, err := bytesize.Parse(strings.TrimSuffix(string(text), "/s"))
	if err == nil && n == 0 {
		err = errors.New("a rate of 0 would never end")
	}
	*r = rate(n)
	return err
}

// connections is a number of connections; 0 is auto.
type connections int

func (c *connections) UnmarshalText(text []byte) error {
	if string(text) == "auto" {
		*c = 0
		return nil
	}
	n, err := strconv.Atoi(string(text))
	if err != nil || n < 1 || n > 64 {
		return fmt.Errorf("%q: want 1 to 64, or auto", text)
	}
	*c = connections(n)
	return nil
}

// Limits of flags. A request is memory, twice depth times.
const (
	minRequest, maxRequest = 4 << 10, 64 << 20
	maxDepth               = 256
	maxMemory              = 4 << 30
)

// Validate is kong's hook for what no single flag can check.
func (c *copyFlags) Validate() error {
	if c.Reflink == "always" && c.Preallocation != "off" {
		return fmt.Errorf("--reflink always and --preallocation %s: blocks that are shared are neither reserved nor written; want one of the two", c.Preallocation)
	}
	if err := validateRequests(c.RequestSize, c.Depth); err != nil {
		return err
	}
	if c.BackingFormat != "" && c.Backing == "" {
		return errors.New("--backing-format: there is no --backing")
	}
	if c.Sparse != nil && *c.Sparse%512 != 0 {
		return fmt.Errorf("--sparse: %d bytes: want a multiple of 512, or 0", *c.Sparse)
	}
	return nil
}

// reflinks are the values of --reflink.
var reflinks = map[string]transfer.Reflink{
	"auto": transfer.ReflinkAuto, "always": transfer.ReflinkAlways, "never": transfer.ReflinkNever,
}

// digestFlag is --digest, whose value is only what follows after =.
type digestFlag digest.Algorithm

// IsBool makes kong take the flag without a value.
func (*digestFlag) IsBool() bool { return true }

// Decode implements kong.MapperValue.
func (f *digestFlag) Decode(ctx *kong.DecodeContext) error {
	*f = digestFlag(digest.Blksum)
	if ctx.Scan.Peek().Type != kong.FlagValueToken {
		return nil
	}
	algorithm, err := digest.Parse(fmt.Sprint(ctx.Scan.Pop().Value))
	*f = digestFlag(algorithm)
	return err
}

func validateRequests(size bytesize.Size, depth int) error {
	if size < minRequest || size > maxRequest || size%512 != 0 {
		return fmt.Errorf("--request-size: %d bytes: want a multiple of 512 from 4KiB to 64MiB", size)
	}
	if depth < 1 || depth > maxDepth {
		return fmt.Errorf("--depth: %d: want 1 to %d", depth, maxDepth)
	}
	if memory := 2 * int64(depth) * int64(size); memory > maxMemory {
		return fmt.Errorf("--depth %d and --request-size %s take %s of memory; want at most %s", depth,
			bytesize.Format(int64(size)), bytesize.Format(memory), bytesize.Format(maxMemory))
	}
	return nil
}
