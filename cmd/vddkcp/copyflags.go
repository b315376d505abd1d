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

// copyFlags are the flags of vddkcp copy. docs/cli.md describes them.
type copyFlags struct {
	sourceFlags

	Format        string         `help:"Format of DST: raw, qcow2 or vmdk (streamOptimized). By default the name of DST decides." enum:",raw,qcow2,vmdk" default:"" placeholder:"FORMAT" group:"Target:"`
	Force         bool           `help:"Replace an existing file DST." group:"Target:"`
	Compress      string         `help:"Compression method, optionally with a level (such as zlib:9): none, zlib or zstd for a qcow2 target, zlib for a VMDK target." placeholder:"METHOD[:LEVEL]" group:"Target:"`
	ClusterSize   *bytesize.Size `help:"Cluster size of a qcow2 target (default 64KiB)." placeholder:"SIZE" group:"Target:"`
	Backing       string         `help:"Write DST as a qcow2 overlay of the disk FILE, with only the data that differs from FILE. If FILE is a relative path, it starts at the folder of DST." placeholder:"FILE" group:"Target:"`
	BackingFormat string         `help:"Format of the backing file: raw, qcow2 or vmdk. By default it is detected from the content." enum:",raw,qcow2,vmdk" default:"" placeholder:"FORMAT" group:"Target:"`
	Preallocation string         `help:"Space for the holes in the file DST: off (no space, the file is sparse), falloc (the space is reserved) or full (zeros are written)." enum:"off,falloc,full" default:"off" group:"Target:"`
	Sparse        *bytesize.Size `help:"Turn runs of zeros in the data of SRC into holes if they have at least this size (default 4KiB). With 0, the zeros are written as data." placeholder:"SIZE" group:"Target:"`
	Reflink       string         `help:"Share blocks with SRC instead of copying them, on a file system that supports it: auto, always (the copy fails if sharing is not possible) or never." enum:"auto,always,never" default:"auto" group:"Target:"`
	TargetIsZero  bool           `help:"Write no zeros for the holes of SRC. Use this flag only if all of DST already reads as zeros." group:"Target:"`
	Verify        bool           `help:"After the copy, read DST back and compare it with SRC, before DST gets its final name." group:"Target:"`
	Size          *bytesize.Size `help:"Size of the disk that is read from standard input." placeholder:"SIZE" group:"Target:"`

	RequestSize bytesize.Size `help:"Number of bytes in each read (default 1MiB)." default:"1MiB" placeholder:"SIZE" group:"Speed:"`
	Depth       int           `help:"Number of concurrent reads on each connection (default 4)." default:"4" placeholder:"N" group:"Speed:"`
	Connections connections   `help:"Number of connections, or auto. For an NBD server, auto means 4 connections if the server allows several connections. For VDDK, it means up to 4 connections, as long as each new connection makes reading faster." default:"auto" placeholder:"N|auto" group:"Speed:"`
	RateLimit   rate          `help:"Maximum number of bytes to read per second." placeholder:"BYTES/s" group:"Speed:"`
	Cache       string        `help:"Keep copied data in the page cache of the kernel, or drop it from there (default: drop if the copy is larger than a quarter of the memory)." enum:",keep,drop" default:"" placeholder:"keep|drop" group:"Speed:"`

	Resume  bool   `help:"Continue an earlier copy to DST that stopped, if there is one." group:"Target:"`
	Journal string `help:"File in which the copy records its progress for --resume (default: next to DST, or in the user's state folder)." placeholder:"FILE" type:"path" group:"Target:"`

	Progress string     `help:"How to show progress: auto, bar, json or none." enum:"auto,bar,json,none" default:"auto" group:"Report:"`
	Report   string     `help:"Write a report to this file at the end, even if the copy fails: an HTML page if the name ends in .html, JSON otherwise." placeholder:"FILE" type:"path" group:"Report:"`
	Metrics  string     `help:"Write metrics to this file, every 10 s and at the end, for the textfile collector of the Prometheus node exporter. The name must end in .prom." placeholder:"FILE.prom" type:"path" group:"Report:"`
	Digest   digestFlag `help:"Compute a digest of the content of the disk for the log and the report. The value, which must follow an equals sign, is the algorithm: sha256, or blksum (default), which nbdcopy --blkhash computes too." group:"Report:"`
	DryRun   bool       `help:"Open both disks and print the plan, but copy nothing." group:"Report:"`
}

// The type rate is a number of bytes per second.
type rate int64

func (r *rate) UnmarshalText(text []byte) error {
	n, err := bytesize.Parse(strings.TrimSuffix(string(text), "/s"))
	if err == nil && n == 0 {
		err = errors.New("at a rate of 0 nothing would be read: want 1 or more bytes per second")
	}
	*r = rate(n)
	return err
}

// The type connections is a number of connections; 0 stands for auto.
type connections int

func (c *connections) UnmarshalText(text []byte) error {
	if string(text) == "auto" {
		*c = 0
		return nil
	}
	n, err := strconv.Atoi(string(text))
	if err != nil || n < 1 || n > 64 {
		return fmt.Errorf("%q: want a number of connections from 1 to 64, or auto", text)
	}
	*c = connections(n)
	return nil
}

// These are the limits for --request-size, for --depth, and for the memory of one
// connection, in bytes. A copy uses at most 2 * --depth * --request-size bytes of memory for
// each connection.
const (
	minRequest, maxRequest = 4 << 10, 64 << 20
	maxDepth               = 256
	maxMemory              = 4 << 30
)

// Validate checks combinations of flags. The package kong calls it.
func (c *copyFlags) Validate() error {
	if c.Reflink == "always" && c.Preallocation != "off" {
		return fmt.Errorf("--reflink always and --preallocation %s exclude each other, because blocks that are shared with SRC are neither reserved nor written: use only one of the two flags", c.Preallocation)
	}
	if err := validateRequests(c.RequestSize, c.Depth); err != nil {
		return err
	}
	if err := checkMetrics(c.Metrics); err != nil {
		return err
	}
	if c.BackingFormat != "" && c.Backing == "" {
		return errors.New("--backing-format: this flag needs --backing")
	}
	if c.Sparse != nil && *c.Sparse%512 != 0 {
		return fmt.Errorf("--sparse: %d bytes: want a multiple of 512, or 0", *c.Sparse)
	}
	return nil
}

// The method reads returns the flags for reading that not all commands have.
func (c *copyFlags) reads() reads {
	return reads{requestSize: c.RequestSize, depth: c.Depth, connections: c.Connections}
}

// reflinks maps the values of --reflink to the constants of package transfer with the same
// meaning.
var reflinks = map[string]transfer.Reflink{
	"auto": transfer.ReflinkAuto, "always": transfer.ReflinkAlways, "never": transfer.ReflinkNever,
}

// digestFlag is the value of --digest. The value is optional. It must follow the flag
// after an equals sign: --digest=sha256.
type digestFlag digest.Algorithm

// IsBool tells kong that the flag may be given without a value.
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
		return fmt.Errorf("--depth: %d: want 1 to %d concurrent reads", depth, maxDepth)
	}
	if memory := 2 * int64(depth) * int64(size); memory > maxMemory {
		return fmt.Errorf("--depth %d and --request-size %s need %s of memory for each connection: want at most %s", depth,
			bytesize.Format(int64(size)), bytesize.Format(memory), bytesize.Format(maxMemory))
	}
	return nil
}
