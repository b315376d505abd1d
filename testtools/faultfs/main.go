// Faultfs mounts a file system whose calls fail in chosen ways on top of a real
// folder. Tests of vddkcp run it.
//
//	faultfs MOUNTPOINT FOLDER
//
// Faultfs shows the files of FOLDER at MOUNTPOINT. It reads a JSON array of
// faults from the first line of standard input, writes the line "mounted" to
// standard output, and unmounts when standard input ends.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: faultfs MOUNTPOINT FOLDER")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(mountpoint, folder string) error {
	in := bufio.NewReader(os.Stdin)
	line, err := in.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("cannot read the faults from standard input: %w", err)
	}
	of := &faultFS{calls: map[string]int{}}
	if err := json.Unmarshal(line, &of.faults); err != nil {
		return fmt.Errorf("cannot decode the faults on standard input as JSON: %w", err)
	}
	root := &fs.LoopbackRoot{Path: folder}
	root.RootNode = &faultNode{&fs.LoopbackNode{RootData: root}, of}
	server, err := fs.Mount(mountpoint, root.RootNode, &fs.Options{MountOptions: fuse.MountOptions{DirectMountStrict: true, FsName: "faults", MaxWrite: 1 << 20}})
	if err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	_, err = fmt.Println("mounted")
	if err == nil {
		_, err = io.Copy(io.Discard, in)
	}
	return errors.Join(err, server.Unmount())
}

// faultFS holds the faults of a file system and counts its calls.
type faultFS struct {
	mu     sync.Mutex
	faults []fault
	calls  map[string]int
}

// A fault says what happens to a call of the file system. The tests of vddkcp send it as JSON.
type fault struct {
	Call  string // "write" (of the disk), "fsync", "rename" or "read"
	At    int    // the number of the call of this kind that fails, counted from 1; 0: every call
	Errno syscall.Errno
	Do    string // if Errno is 0: "drop" does nothing and reports success, "short" writes half of the data, "flip" changes a bit of the data, "delay" waits
}

// The method next counts a call of the given kind, and returns the fault that applies to this call.
// If no fault applies, it returns the zero value.
func (f *faultFS) next(call string) fault {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[call]++
	for _, fault := range f.faults {
		if fault.Call == call && (fault.At == 0 || fault.At == f.calls[call]) {
			if fault.Do == "delay" {
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
	case f.Errno != 0:
		return f.Errno
	case f.Do == "drop":
		return 0
	}
	return n.LoopbackNode.Rename(ctx, name, parent, newName, flags)
}

// PassthroughFd returns no file descriptor. If the kernel had one, it would read and
// write the file itself, and would not call Write.
func (f *faultFile) PassthroughFd() (int, bool) { return -1, false }

func (f *faultFile) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	if len(data) < 512<<10 { // a write of the journal, not of the disk
		return f.LoopbackFile.Write(ctx, data, off)
	}
	switch fault := f.of.next("write"); {
	case fault.Errno != 0:
		return 0, fault.Errno
	case fault.Do == "drop":
		return uint32(len(data)), 0
	case fault.Do == "short" && len(data) > 1:
		data = data[:len(data)/2]
	case fault.Do == "flip":
		data[len(data)/3] ^= 4
	}
	return f.LoopbackFile.Write(ctx, data, off)
}

func (f *faultFile) Fsync(ctx context.Context, flags uint32) syscall.Errno {
	switch fault := f.of.next("fsync"); {
	case fault.Errno != 0:
		return fault.Errno
	case fault.Do == "drop":
		return 0
	}
	return f.LoopbackFile.Fsync(ctx, flags)
}
