package client_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// exampleServer serves a disk on a socket in dir until ctx ends, and returns the
// URI of the export. Any NBD server does: nbdkit, qemu-nbd, "vddkcp export".
func exampleServer(ctx context.Context, dir string, disk source.Disk, o server.Options) *nbd.URI {
	s, err := server.New(server.Fixed{{Disk: disk}}, o)
	if err != nil {
		log.Fatal(err)
	}
	l, err := server.Listen(ctx, "unix:"+filepath.Join(dir, "nbd.socket"))
	if err != nil {
		log.Fatal(err)
	}
	go s.Serve(ctx, l)
	uri, err := nbd.ParseURI(server.URI(l.Addr(), false, ""))
	if err != nil {
		log.Fatal(err)
	}
	return uri
}

// A program copies a disk from an NBD server to a file. It reads only the ranges
// that the server does not know to be zeros, and leaves holes in the file for the
// others.
func ExampleOpen() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	// The exported disk has 1 MiB, of which 64 KiB at 512 KiB hold data.
	uri := exampleServer(ctx, dir, sourcetest.Pattern(1<<20, source.Extent{Off: 512 << 10, Len: 64 << 10}), server.Options{})

	disk, err := client.Open(ctx, uri, client.Options{Connections: 2})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	file, err := os.Create(filepath.Join(dir, "copy.img"))
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(disk.Size()); err != nil {
		log.Fatal(err)
	}
	for e, err := range disk.Extents(ctx, 0, disk.Size()) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("%v at %d KiB, %d KiB\n", e.Kind, e.Off>>10, e.Len>>10)
		if e.Kind == source.Zero {
			continue
		}
		if _, err := io.Copy(io.NewOffsetWriter(file, e.Off), io.NewSectionReader(disk, e.Off, e.Len)); err != nil {
			log.Fatal(err)
		}
	}
	if err := file.Sync(); err != nil {
		log.Fatal(err)
	}

	// Output:
	// zero at 0 KiB, 512 KiB
	// data at 512 KiB, 64 KiB
	// zero at 576 KiB, 448 KiB
}

// A program writes a disk to an export, which is complete once Publish returns.
func ExampleCreate() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	const size = 1 << 20
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		log.Fatal(err)
	}
	exported, err := raw.OpenWritable(ctx, path)
	if err != nil {
		log.Fatal(err)
	}
	defer exported.Close()
	uri := exampleServer(ctx, dir, exported, server.Options{Writable: true})

	disk, err := client.Create(ctx, uri, size, client.SinkOptions{TargetIsZero: true})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Abort() // does nothing after Publish
	sector := make([]byte, 512)
	copy(sector, "a boot sector")
	if _, err := disk.WriteAt(sector, 0); err != nil {
		log.Fatal(err)
	}
	if err := disk.ZeroAt(ctx, 512, size-512); err != nil {
		log.Fatal(err)
	}
	if err := disk.Finish(ctx); err != nil { // flushes what was written
		log.Fatal(err)
	}
	if err := disk.Publish(ctx); err != nil {
		log.Fatal(err)
	}

	written, err := os.ReadFile(path)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%d bytes, beginning with %q\n", len(written), written[:13])

	// Output:
	// 1048576 bytes, beginning with "a boot sector"
}
