package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// writeImage writes a VMDK of 192 KiB: 64 KiB in a file and 128 KiB of zeros.
func writeImage(dir string) (path string) {
	const descriptor = `# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicFlat"
RW 128 FLAT "disk-flat.vmdk" 0
RW 256 ZERO
`
	path = filepath.Join(dir, "disk.vmdk")
	flat := bytes.Repeat([]byte("VMware! "), 64<<10/8)
	if err := errors.Join(
		os.WriteFile(path, []byte(descriptor), 0o600),
		os.WriteFile(filepath.Join(dir, "disk-flat.vmdk"), flat, 0o600),
	); err != nil {
		log.Fatal(err)
	}
	return path
}

// A program opens an image, lists the allocation of the disk, and reads from it.
func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	var opener open.Opener
	disk, err := opener.Open(context.Background(), writeImage(dir), "")
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()

	for extent, err := range source.Covered(context.Background(), disk, 0, disk.Size()) {
		if err != nil {
			log.Fatal(err)
		}
		fmt.Printf("[%d, %d): %v\n", extent.Off, extent.End(), extent.Kind)
	}

	p := make([]byte, 8)
	if _, err := disk.ReadAt(p, 1024); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%q\n", p)

	n, err := disk.ReadAt(p, disk.Size()-4) // passes the end of the disk
	fmt.Println(n, err == io.EOF)

	// Output:
	// [0, 65536): data
	// [65536, 196608): zero
	// "VMware! "
	// 4 true
}

// Optional abilities are requested with Ability. A caller must work without them.
func ExampleAbility() {
	disk := &sourcetest.Memory{Bytes: make([]byte, 512), ID: "disk 1"}

	if identified, ok := source.Ability[source.Identified](disk); ok {
		id, proof, err := identified.Identity(context.Background())
		fmt.Println(id, proof, err)
	}
	_, ok := source.Ability[source.Writable](disk)
	fmt.Println("writable:", ok)

	// Output:
	// disk 1 snapshot <nil>
	// writable: false
}

// Retry wraps the opening of a disk. Reads that fail are repeated, and the disk is
// opened again when repeating a read does not help.
func ExampleRetry() {
	failures := 2
	openDisk := func(ctx context.Context) (source.Disk, error) {
		fmt.Println("open")
		return &sourcetest.Memory{
			Context: ctx,
			Bytes:   []byte("the content of the disk"),
			ID:      "disk 1",
			OnRead: func(int64, int) error {
				if failures--; failures >= 0 {
					return errors.New("connection reset by peer")
				}
				return nil
			},
		}, nil
	}

	disk, err := source.Retry(context.Background(), openDisk, source.RetryOptions{
		Retries: 5,
		Timeout: time.Minute,
		Backoff: func(n int) time.Duration { return time.Millisecond },
		OnRetry: func(err error, wait time.Duration) { fmt.Println("retry:", err) },
	})
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()

	p := make([]byte, 11)
	if _, err := disk.ReadAt(p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)

	// Output:
	// open
	// retry: connection reset by peer
	// retry: connection reset by peer
	// open
	// the content
}
