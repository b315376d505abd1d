package main

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// faultFS is a file system whose calls fail as a test says: it lies over a real
// folder.
type faultFS struct {
	mu     sync.Mutex
	faults []fault
	calls  map[string]int
}

// fault is what happens to a call.
type fault struct {
	call  string // "write" (of the disk), "fsync", "rename" or "read"
	at    int    // which of them, from 1; 0: every
	errno syscall.Errno
	do    string // with errno 0: "drop" it and say that it was done, "short": half of it, "flip" a bit of what it writes, "delay"
}

// next counts a call and returns what is to happen to it.
func (f *faultFS) next(call string) fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[call]++
	for _, fault := range f.faults {
		if fault.call == call && (fault.at == 0 || fault.at == f.calls[call]) {
			if fault.do == "delay" {
				time.Sleep(200 * time.Millisecond) // the fault itself
			}
			return fault
		}
	}
	return fault{}
}

type faultNode struct {
	*fs.LoopbackNode
	of *faultFS
}

func (n *faultNode) WrapChild(_ context.Context, child fs.InodeEmbedder) fs.InodeEmbedder {
	return &faultNode{child.(*fs.LoopbackNode), n.of}
}

type faultFile struct {
	*fs.LoopbackFile
	of *faultFS
}

func (n *faultNode) wrap(fh fs.FileHandle) fs.FileHandle {
	if f, ok := fh.(*fs.LoopbackFile); ok {
		return &faultFile{f, n.of}
	}
	return fh
}

func (n *faultNode) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	inode, fh, fuseFlags, errno := n.LoopbackNode.Create(ctx, name, flags, mode, out)
	return inode, n.wrap(fh), fuseFlags, errno
}

func (n *faultNode) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	fh, fuseFlags, errno := n.LoopbackNode.Open(ctx, flags)
	return n.wrap(fh), fuseFlags, errno
}

func (n *faultNode) Rename(ctx context.Context, name string, parent fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	switch f := n.of.next("rename"); {
	case f.errno != 0:
		return f.errno
	case f.do == "drop":
		return 0
	}
	return n.LoopbackNode.Rename(ctx, name, parent, newName, flags)
}

// PassthroughFd would hide reads and writes.
func (f *faultFile) PassthroughFd() (int, bool) { return -1, false }

func (f *faultFile) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	if len(data) < 512<<10 { // the journal's
		return f.LoopbackFile.Write(ctx, data, off)
	}
	switch fault := f.of.next("write"); {
	case fault.errno != 0:
		return 0, fault.errno
	case fault.do == "drop":
		return uint32(len(data)), 0
	case fault.do == "short" && len(data) > 1:
		data = data[:len(data)/2]
	case fault.do == "flip":
		data[len(data)/3] ^= 4
	}
	return f.LoopbackFile.Write(ctx, data, off)
}

func (f *faultFile) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	switch fault := f.of.next("fsync"); {
	case fault.errno != 0:
		return fault.errno
	case fault.do == "drop":
		return 0
	}
	return f.LoopbackFile.Fsync(ctx, flags)
}

// mountFaults mounts such a file system, and returns its folder and that below.
func mountFaults(t *testing.T, faults ...fault) (dir, below string) {
	t.Helper()
	peer.NeedRoot(t)
	peer.NeedFile(t, "/dev/fuse")
	dir, below = t.TempDir(), t.TempDir()
	of := &faultFS{faults: faults, calls: map[string]int{}}
	root := &fs.LoopbackRoot{Path: below}
	root.RootNode = &faultNode{&fs.LoopbackNode{RootData: root}, of}
	server, err := fs.Mount(dir, root.RootNode, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "faults", MaxWrite: 1 << 20}})
	if err != nil {
		t.Fatalf("mount: %v", err)
	}
	t.Cleanup(func() {
		if err := server.Unmount(); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir, below
}

// Whatever a file system does to a copy, it ends identical, or not with 0.
func TestFaultsOfTheFileSystem(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.raw")
	random(t, disk, 12<<20)
	for _, c := range []struct {
		name   string
		faults []fault
		args   []string
		exit   int
		says   string // on standard error
		kept   bool   // the .partial
	}{
		{name: "nothing", exit: 0},
		{name: "the first write fails", faults: []fault{{call: "write", at: 3, errno: syscall.EIO}}, exit: 1, says: "input/output error"},
		{name: "the last write fails", faults: []fault{{call: "write", at: 12, errno: syscall.EIO}}, exit: 1, says: "input/output error"},
		{name: "no space", faults: []fault{{call: "write", at: 9, errno: syscall.ENOSPC}}, exit: 75, says: "hint: with --resume", kept: true},
		{name: "quota", faults: []fault{{call: "write", at: 9, errno: syscall.EDQUOT}}, exit: 75, says: "quota", kept: true},
		{name: "short writes", faults: []fault{{call: "write", do: "short"}}, exit: 0},
		{name: "slow", faults: []fault{{call: "write", at: 5, do: "delay"}, {call: "fsync", do: "delay"}}, exit: 0},
		{name: "fsync fails", faults: []fault{{call: "fsync", errno: syscall.EIO}}, exit: 1, says: "fsync"},
		{name: "rename fails", faults: []fault{{call: "rename", errno: syscall.EIO}}, exit: 1, says: "rename"},
		{name: "a write is lost", faults: []fault{{call: "write", at: 7, do: "drop"}}, args: []string{"--verify"}, exit: 3, says: "does not hold what was read", kept: true},
		{name: "a bit is flipped", faults: []fault{{call: "write", at: 11, do: "flip"}}, args: []string{"--verify"}, exit: 3, says: "1 ranges, 1 bytes", kept: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir, below := mountFaults(t, c.faults...)
			out := filepath.Join(dir, "out.raw")
			r := vddkcp(t, append(c.args, "--request-size", "1MiB", disk, out)...)
			if r.exit != c.exit || !strings.Contains(r.stderr, c.says) {
				t.Errorf("exit status %d, want %d and %q\n%s", r.exit, c.exit, c.says, r.stderr)
			}
			final := filepath.Join(below, "out.raw")
			if c.exit == 0 {
				peer.Run(t, "cmp", disk, final)
				return
			}
			if _, err := os.Lstat(final); err == nil {
				t.Error("the final name is there")
			}
			if _, err := os.Lstat(final + ".partial"); (err == nil) != c.kept {
				t.Errorf(".partial: %v", err)
			}
			if c.exit == 75 { // room was made
				copies(t, "--resume", disk, filepath.Join(below, "out.raw"))
				peer.Run(t, "cmp", disk, final)
			}
		})
	}
}
