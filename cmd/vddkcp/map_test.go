package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// output is what vddkcp writes to standard output; it must succeed.
func output(t *testing.T, args ...string) string {
	t.Helper()
	cmd := command(t, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if r := ended(t, cmd, cmd.Run(), &stderr); r.exit != 0 {
		t.Fatalf("vddkcp %s: exit status %d\n%s", strings.Join(args, " "), r.exit, r.stderr)
	}
	return stdout.String()
}

// mapsLikeQemu holds the map of a source, as JSON and as a table, against
// qemu-img's. It returns the JSON.
func mapsLikeQemu(t *testing.T, path, format string) string {
	t.Helper()
	got := output(t, "map", "--json", path)
	want := peer.Run(t, "qemu-img", "map", "-f", format, "--output=json", path)
	sameLines(t, "map --json "+path, got, want)
	if !strings.Contains(want, `"data": true, "offset"`) && strings.Contains(want, `"data": true`) {
		return got // compressed: qemu-img has no table
	}
	sameLines(t, "map "+path, output(t, "map", path), peer.Run(t, "qemu-img", "map", "-f", format, path))
	return got
}

func sameLines(t *testing.T, what, got, want string) {
	t.Helper()
	g, w := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range max(len(g), len(w)) {
		if i >= len(g) || i >= len(w) || g[i] != w[i] {
			t.Fatalf("%s: line %d of %d:\n%s\nqemu-img, of %d:\n%s", what, i+1, len(g),
				strings.Join(g[min(i, len(g)):min(i+2, len(g))], "\n"), len(w), strings.Join(w[min(i, len(w)):min(i+2, len(w))], "\n"))
		}
	}
}

func TestMapLikeQemu(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "mke2fs")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ext4(t, in("disk.raw"))
	// Holes, and bytes behind the last of them.
	peer.Run(t, "qemu-io", "-f", "raw", "-c", "discard 20M 3M", "-c", "write -P 7 59M 1M", in("disk.raw"))
	t.Run("raw", func(t *testing.T) { mapsLikeQemu(t, in("disk.raw"), "raw") })
	t.Run("empty raw", func(t *testing.T) {
		if err := os.WriteFile(in("hole.raw"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(in("hole.raw"), 3<<20); err != nil {
			t.Fatal(err)
		}
		mapsLikeQemu(t, in("hole.raw"), "raw")
	})
	for _, options := range []string{
		"subformat=monolithicFlat",
		"subformat=monolithicSparse",
		"subformat=monolithicSparse,zeroed_grain=on",
		"subformat=monolithicSparse,compat6=on",
		"subformat=twoGbMaxExtentSparse",
		"subformat=twoGbMaxExtentFlat",
		"subformat=streamOptimized",
	} {
		t.Run(options, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vmdk")
			peer.Run(t, "qemu-img", "convert", "-O", "vmdk", "-o", options, in("disk.raw"), path)
			if !strings.Contains(options, "streamOptimized") {
				peer.Run(t, "qemu-io", "-f", "vmdk", "-c", "write -P 9 21M 200k", "-c", "write -z 1M 1M", "-c", "write -P 8 30000k 70k", path)
			}
			mapsLikeQemu(t, path, "vmdk")
		})
	}
}

// TestMapOfManyFiles has data on both sides of the borders between files.
func TestMapOfManyFiles(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io")
	for _, subformat := range []string{"twoGbMaxExtentSparse", "twoGbMaxExtentFlat"} {
		t.Run(subformat, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.vmdk")
			peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-o", "subformat="+subformat, path, "5000000000")
			peer.Run(t, "qemu-io", "-f", "vmdk",
				"-c", "write -P 1 0 1M", "-c", "write -P 2 2147400000 200000", "-c", "write -P 3 4294966000 3000", "-c", "write -P 4 4999990000 9728", path)
			mapsLikeQemu(t, path, "vmdk")
		})
	}
}

// TestMapOfChains has two children over a base of each kind; their grains
// neither have the base's borders nor lie in the file in the disk's order.
func TestMapOfChains(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "mke2fs")
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.raw")
	ext4(t, disk)
	for _, base := range []string{"monolithicSparse", "monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat", "streamOptimized"} {
		for _, child := range []string{"monolithicSparse", "twoGbMaxExtentSparse", "monolithicSparse,zeroed_grain=on"} {
			t.Run(base+" "+child, func(t *testing.T) {
				dir := t.TempDir()
				path := func(name string) string { return filepath.Join(dir, name+".vmdk") }
				peer.Run(t, "qemu-img", "convert", "-O", "vmdk", "-o", "subformat="+base, disk, path("base"))
				for i, names := range [][2]string{{"base", "middle"}, {"middle", "top"}} {
					peer.Run(t, "qemu-img", "create", "-q", "-f", "vmdk", "-F", "vmdk", "-b", names[0]+".vmdk", "-o", "subformat="+child, path(names[1]))
					args := []string{"-f", "vmdk"}
					for k := range 24 {
						off := (i*77777 + (23-k)*2555555) / 512 * 512
						args = append(args, "-c", fmt.Sprintf("write -P %d %d %d", 16*i+k+1, off, 512*(1+k*37)))
					}
					peer.Run(t, "qemu-io", append(args, "-c", "write -z 4M 1M", "-c", fmt.Sprintf("write -z %dM 64k", 6+i), path(names[1]))...)
				}
				if base == "streamOptimized" { // qemu-img makes no table of it
					sameLines(t, "map --json", output(t, "map", "--json", path("top")), peer.Run(t, "qemu-img", "map", "-f", "vmdk", "--output=json", path("top")))
					return
				}
				got := mapsLikeQemu(t, path("top"), "vmdk")
				for depth := range 3 {
					if want := fmt.Sprintf(`"depth": %d, "present": true`, depth); !strings.Contains(got, want) {
						t.Errorf("no %s", want)
					}
				}
			})
		}
	}
}

func TestMapOfBlockDevice(t *testing.T) {
	peer.Need(t, "qemu-img")
	device, _ := loop(t, 3<<20, 0)
	mapsLikeQemu(t, device, "raw")
}

// TestMapWhereQemuDiffers has what docs/decisions.md lists.
func TestMapWhereQemuDiffers(t *testing.T) {
	peer.Need(t, "qemu-img", "mke2fs")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }

	// A disk that is no multiple of a sector ends where it ends.
	random(t, in("odd.raw"), 100_001)
	if got, want := output(t, "map", "--json", in("odd.raw")), `[{ "start": 0, "length": 100001, "depth": 0, "present": true, "zero": false, "data": true, "offset": 0}]`+"\n"; got != want {
		t.Errorf("%s\nwant %s", got, want)
	}

	// Compressed grains are in the table.
	ext4(t, in("disk.raw"))
	peer.Run(t, "qemu-img", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", in("disk.raw"), in("stream.vmdk"))
	var extents []struct {
		Start, Length int64
		Data          bool
	}
	if err := json.Unmarshal([]byte(output(t, "map", "--json", in("stream.vmdk"))), &extents); err != nil {
		t.Fatal(err)
	}
	want := "Offset          Length          Mapped to       File\n"
	for _, e := range extents {
		if e.Data {
			want += fmt.Sprintf("%#-16x%#-16x%-16s-\n", e.Start, e.Length, "-")
		}
	}
	sameLines(t, "table", strings.Replace(output(t, "map", in("stream.vmdk")), "\n0x0 ", "\n0   ", 1), strings.Replace(want, "\n0x0 ", "\n0   ", 1))
}

// TestMapIsStreamed stops reading the map of millions of grains in the middle.
func TestMapIsStreamed(t *testing.T) {
	image := filepath.Join(t.TempDir(), "scattered.vmdk")
	peer.Need(t, "go")
	peer.Run(t, "go", "run", "../../scripts/scattered", image, "512", "10")
	cmd := command(t, "map", "--json", image)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	r := bufio.NewReader(stdout)
	if _, err := io.CopyN(io.Discard, r, 100<<20); err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	kib := 0
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmHWM: %d kB", &kib)
	}
	if kib == 0 || kib > 40<<10 {
		t.Errorf("a peak of %d KiB of memory, want 40 MiB at most", kib)
	}
	lines, last := 0, ""
	for {
		line, err := r.ReadString('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		lines, last = lines+1, line
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if lines < 100_000 || !strings.HasSuffix(last, "}]\n") {
		t.Errorf("after %d lines more it ends with %q", lines, last)
	}
}

// TestMapIsStopped sends a signal while nobody reads.
func TestMapIsStopped(t *testing.T) {
	peer.Need(t, "go")
	image := filepath.Join(t.TempDir(), "scattered.vmdk")
	peer.Run(t, "go", "run", "../../scripts/scattered", image, "64", "10")
	cmd := command(t, "map", "--json", image)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// Less than is written at once.
	full, err := unix.FcntlInt(r.Fd(), unix.F_SETPIPE_SZ, os.Getpagesize())
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	for n := 0; n < full; { // then it waits for room for more, or is about to
		if n, err = unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ); err != nil {
			t.Fatal(err)
		}
		runtime.Gosched()
	}
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if res := ended(t, cmd, cmd.Wait(), &stderr); res.exit != 130 || !strings.Contains(res.stderr, "stopped by SIGINT") {
		t.Errorf("exit status %d, %q; want 130", res.exit, res.stderr)
	}
}

// TestOutputGoesAway has a reader of standard output that has ended.
func TestOutputGoesAway(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.raw")
	random(t, path, 4096)
	for _, args := range [][]string{{"map", path}, {"map", "--json", path}, {"info", path}, {"info", "--json", path}} {
		cmd := command(t, args...)
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		r.Close()
		var stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = w, &stderr
		res := ended(t, cmd, cmd.Run(), &stderr)
		w.Close()
		if res.exit != 1 || !strings.Contains(res.stderr, "broken pipe") {
			t.Errorf("vddkcp %v: exit status %d, %q; want 1 and a broken pipe", args, res.exit, res.stderr)
		}
	}
}
