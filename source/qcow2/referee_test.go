package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source/open"
)

// refereeLimit bounds the disk of a damaged image, in bytes: both sides read all of it.
const refereeLimit = 64 << 20

// TestReferee damages images of qemu-img's, a few bytes of each where they hurt
// most, for VDDKCP_REFEREE (a duration, 2s without it; `make fuzz-long` takes an
// hour), and reads them. If both vddkcp and qemu-img can read an image, they must
// read the same content. One of them may refuse an image that the other reads:
// qemu-img checks refcounts, which vddkcp ignores, and vddkcp refuses reserved bits
// and clusters past the end of the file, which qemu-img ignores or reads as zeros.
// VDDKCP_REFEREE_SEED repeats the image of a seed.
func TestReferee(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	length := 2 * time.Second
	if s := os.Getenv("VDDKCP_REFEREE"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil {
			t.Fatalf("VDDKCP_REFEREE: %v", err)
		}
	}
	images := refereeImages(t)
	dir := t.TempDir()
	seed, one := rand.Uint64(), false
	if s := os.Getenv("VDDKCP_REFEREE_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("VDDKCP_REFEREE_SEED: %v", err)
		}
		one = true
	}
	t.Logf("from seed %d", seed)
	both, ours, theirs, neither := 0, 0, 0, 0
	for end := time.Now().Add(length); one || both == 0 || time.Now().Before(end); seed++ {
		r := rand.New(rand.NewPCG(seed, 0))
		b := bytes.Clone(images[r.IntN(len(images))])
		damage(r, b)
		if binary.BigEndian.Uint64(b[24:]) > refereeLimit {
			if one {
				t.Fatalf("seed %d makes a disk that is too large", seed)
			}
			continue
		}
		path := filepath.Join(dir, "damaged.qcow2")
		if err := os.WriteFile(path, b, 0o666); err != nil {
			t.Fatal(err)
		}
		got, ourErr := readWhole(t.Context(), path)
		got = got[:len(got)&^511] // qemu has whole sectors alone
		want, theirErr := qemuReads(t.Context(), path, filepath.Join(dir, "qemu.raw"))
		switch {
		case ourErr == nil && theirErr == nil:
			if both++; !bytes.Equal(got, want) {
				t.Errorf("VDDKCP_REFEREE_SEED=%d: qemu-img reads other bytes from %d of %d on", seed, differsAt(got, want), len(want))
			}
		case ourErr == nil:
			ours++
		case theirErr == nil:
			theirs++
		default:
			neither++
		}
		if one {
			t.Logf("we: %v; qemu-img: %v", ourErr, theirErr)
			break
		}
	}
	t.Logf("both read %d, only we %d, only qemu-img %d, neither %d", both, ours, theirs, neither)
}

// refereeImages returns small images that together have all features.
func refereeImages(t *testing.T) (all [][]byte) {
	t.Helper()
	dir := t.TempDir()
	raw := filepath.Join(dir, "disk.raw")
	var content []byte
	for i := range 8 {
		content = append(content, random(uint64(i), 20<<10)...)
		content = append(content, bytes.Repeat([]byte("all work and no play "), 2000)...)
		content = append(content, make([]byte, 40<<10)...)
	}
	if err := os.WriteFile(raw, content[:len(content)&^511], 0o666); err != nil {
		t.Fatal(err)
	}
	for i, options := range [][]string{
		{"-o", "cluster_size=512"},
		{"-o", "cluster_size=4k,compat=0.10"},
		{"-c", "-o", "cluster_size=4k"},
		{"-c", "-o", "cluster_size=64k"},
		{"-c", "-o", "cluster_size=4k,compression_type=zstd"},
		{"-c", "-o", "cluster_size=64k,compression_type=zstd"},
		{"-o", "cluster_size=16k,extended_l2=on"},
		{"-c", "-o", "cluster_size=16k,extended_l2=on,compression_type=zstd"},
	} {
		path := filepath.Join(dir, fmt.Sprint(i))
		peer.Run(t, "qemu-img", append(append([]string{"convert", "-O", "qcow2"}, options...), raw, path)...)
		if i != 1 {
			peer.Run(t, "qemu-io", "-f", "qcow2", "-c", "write -z 100k 20k", "-c", "write -P 7 210k 5k", path)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, b)
	}
	return all
}

// damage changes up to four things in an image, most of them in its tables.
func damage(r *rand.Rand, b []byte) {
	size := int64(len(b))
	get := func(off int64) int64 {
		if off < 0 || off+8 > size {
			return 0
		}
		return int64(binary.BigEndian.Uint64(b[off:]))
	}
	cluster := int64(1) << (get(16) & 31) // cluster_bits are at 20
	l1 := get(40)
	entries := get(32) & (1<<32 - 1) // l1_size is at 36
	l2 := func() int64 {
		return get(l1+8*r.Int64N(max(entries, 1))) & (1<<56 - 512) // "L1 table entry"
	}
	entry := func() int64 { return l2() + 8*r.Int64N(cluster/8) }
	for range 1 + r.IntN(4) {
		at := r.Int64N(size)
		switch r.IntN(8) {
		case 0:
			at = r.Int64N(112)
		case 1:
			at = l1 + r.Int64N(8*max(entries, 1))
		case 2, 3, 4:
			at = entry() + r.Int64N(8)
		case 5: // an entry that is another's
			if from, to := entry(), entry(); max(from, to)+8 <= size {
				copy(b[to:to+8], b[from:])
			}
			continue
		case 6: // one with another kind
			if at = entry(); at+8 <= size {
				b[at] ^= byte(1+r.IntN(3)) << 6
			}
			continue
		}
		if at >= 0 && at < size && (at < 8 || at > 19) { // no other name of a backing file
			b[at] = [...]byte{0, 1, 0xff, b[at] + 1, b[at] ^ 1<<r.IntN(8), byte(r.IntN(256))}[r.IntN(6)]
		}
	}
}

// readWhole reads a disk of at most refereeLimit bytes.
func readWhole(ctx context.Context, path string) ([]byte, error) {
	d, err := new(open.Opener).Open(ctx, path, "qcow2")
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
}

func qemuReads(ctx context.Context, path, to string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if out, err := exec.CommandContext(ctx, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, to).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	return os.ReadFile(to)
}

func differsAt(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
