package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// verifies runs verify and returns its exit status and standard output.
func verifies(t *testing.T, args ...string) (exit int, line string) {
	t.Helper()
	cmd := command(t, append([]string{"verify"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	r := ended(t, cmd, cmd.Run(), &stderr)
	if r.exit != 0 && r.exit != 3 {
		t.Fatalf("verify %s: exit status %d\n%s", strings.Join(args, " "), r.exit, r.stderr)
	}
	return r.exit, stdout.String()
}

// runProgram runs a program that may end with status 1 and returns its output.
func runProgram(t *testing.T, program string, args ...string) (out string, differ bool) {
	t.Helper()
	cmd := exec.Command(program, args...)
	b, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && (!errors.As(err, &exit) || exit.ExitCode() != 1) {
		t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, b)
	}
	return string(b), err != nil
}

// TestVerifyAgreesWithOthers checks that verify finds the same differences as qemu-img
// compare and cmp.
func TestVerifyAgreesWithOthers(t *testing.T) {
	peer.Need(t, "qemu-img", "qemu-io", "mke2fs", "cmp")
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	ext4(t, in("disk.raw"))
	for name, commands := range map[string][]string{
		"same":     {"write -P 0 30M 64k"}, // free space: zeros already
		"byte":     {"write -P 0x77 31457281 1"},
		"ranges":   {"write -P 0x77 30M 64k", "write -P 0x11 50M 513"},
		"boundary": {"write -P 0x77 1048570 12"},
		"last":     {"write -P 0x77 62914559 1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			in2 := func(name string) string { return filepath.Join(dir, name) }
			peer.Run(t, "cp", "--sparse=always", in("disk.raw"), in2("other.raw"))
			for _, c := range commands {
				peer.Run(t, "qemu-io", "-f", "raw", "-c", c, in2("other.raw"))
			}
			// cmp -l lists every byte that differs: its number from 1, and both
			// in octal.
			list, _ := runProgram(t, "cmp", "-l", in("disk.raw"), in2("other.raw"))
			want, bytes := "", 0
			var first, last, ranges, n int64
			var x, y int
			for _, l := range strings.Split(strings.TrimSpace(list), "\n") {
				if l == "" {
					continue
				}
				var a, b int
				if _, err := fmt.Sscanf(l, "%d %o %o", &n, &a, &b); err != nil {
					t.Fatalf("cmp: %q: %v", l, err)
				}
				if bytes++; bytes == 1 {
					first, x, y = n-1, a, b
				}
				if n != last+1 {
					ranges++
				}
				last = n
			}
			if bytes > 0 {
				want = fmt.Sprintf("first difference at byte %d: source 0x%02X, target 0x%02X; %d ranges, %d bytes\n", first, x, y, ranges, bytes)
			}
			if (name == "same") != (bytes == 0) {
				t.Fatalf("%d bytes differ", bytes)
			}
			for _, options := range []string{"", "subformat=monolithicSparse", "subformat=monolithicFlat", "subformat=streamOptimized"} {
				other, format := in2("other.raw"), "raw"
				if options != "" {
					other, format = in2(strings.TrimPrefix(options, "subformat=")+".vmdk"), "vmdk"
					peer.Run(t, "qemu-img", "convert", "-O", "vmdk", "-o", options, in2("other.raw"), other)
				}
				_, differ := runProgram(t, "qemu-img", "compare", "-f", "raw", "-F", format, in("disk.raw"), other)
				exit, line := verifies(t, in("disk.raw"), other)
				if (exit == 3) != differ || line != want {
					t.Errorf("%s: exit status %d, %q; qemu-img differs: %v, cmp: %q", options, exit, line, differ, want)
				}
				sum := strings.Fields(peer.Run(t, "sha256sum", in2("other.raw")))[0]
				if exit, line := verifies(t, "--digest", "sha256:"+sum, other); exit != 0 {
					t.Errorf("%s: digest: %s", options, line)
				}
			}
		})
	}
}

// TestVerifyBlockDevice checks that verify compares only the size of the disk if the
// device is larger.
func TestVerifyBlockDevice(t *testing.T) {
	dir := t.TempDir()
	small, device := filepath.Join(dir, "small.raw"), ""
	random(t, small, 3<<20+512)
	device, _ = loop(t, 4<<20, 0xAA)
	if r := vddkcp(t, small, device); r.exit != 0 {
		t.Fatal(r.stderr)
	}
	if exit, line := verifies(t, small, device); exit != 0 || line != "" {
		t.Errorf("exit status %d, %s", exit, line)
	}
	// As the source its size is the disk's.
	if exit, line := verifies(t, device, small); exit != 3 || line != "sizes differ: source 4194304 bytes, target 3146240 bytes\n" {
		t.Errorf("exit status %d, %s", exit, line)
	}
	f, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content, err := os.ReadFile(small)
	if err != nil {
		t.Fatal(err)
	}
	last := len(content) - 1
	if _, err := f.WriteAt([]byte{^content[last]}, int64(last)); err != nil {
		t.Fatal(err)
	}
	if exit, line := verifies(t, small, device); exit != 3 || line != fmt.Sprintf("first difference at byte %d: source 0x%02X, target 0x%02X; 1 ranges, 1 bytes\n", last, content[last], ^content[last]) {
		t.Errorf("exit status %d, %s", exit, line)
	}
}
