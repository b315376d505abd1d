package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"path/filepath"

	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// copyDisk copies the disk with the address from to a new target with the address to, and
// prints what was copied.
func copyDisk(ctx context.Context, from, to string) error {
	var opener open.Opener
	src, err := opener.Open(ctx, from, "")
	if err != nil {
		return err
	}
	defer src.Close()

	plan, err := transfer.NewPlan(ctx, src)
	if err != nil {
		return err
	}
	fmt.Printf("%d of %d bytes are data\n", plan.Data, plan.Size)

	dst, err := sinkopen.Create(ctx, to, src.Size(), sinkopen.Options{})
	if err != nil {
		return err
	}
	// Copy publishes the target, or removes it after an error.
	counters := new(progress.Counters)
	result, err := transfer.Copy(ctx, src, dst, plan, transfer.Options{
		Digest: digest.Blksum, Verify: true, Counters: counters,
	})
	if err != nil {
		return err
	}
	fmt.Printf("%d bytes written, %d zeroed, verify: %s\n", result.Counts.Written, result.Counts.Zeroed, result.Verify.Status)
	fmt.Printf("%s %s\n", result.Digest.Algorithm, result.Digest.Value)
	return nil
}

// A program copies a VMDK to a raw file, and compares both.
func Example() {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)

	// The VMDK has 64 KiB of data and 128 KiB of zeros.
	vmdk, raw := filepath.Join(dir, "disk.vmdk"), filepath.Join(dir, "disk.raw")
	const descriptor = `# Disk DescriptorFile
version=1
CID=12345678
parentCID=ffffffff
createType="monolithicFlat"
RW 128 FLAT "disk-flat.vmdk" 0
RW 256 ZERO
`
	err = errors.Join(
		os.WriteFile(vmdk, []byte(descriptor), 0o600),
		os.WriteFile(filepath.Join(dir, "disk-flat.vmdk"), bytes.Repeat([]byte("VMware! "), 64<<10/8), 0o600),
	)
	if err != nil {
		log.Fatal(err)
	}

	if err := copyDisk(ctx, vmdk, raw); err != nil {
		log.Fatal(err)
	}

	var opener open.Opener
	a, errA := opener.Open(ctx, vmdk, "")
	b, errB := opener.Open(ctx, raw, "raw")
	if err := errors.Join(errA, errB); err != nil {
		log.Fatal(err)
	}
	defer a.Close()
	defer b.Close()
	difference, err := transfer.Compare(ctx, a, b, transfer.CompareOptions{})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println("equal:", difference == nil)

	// Output:
	// 65536 of 196608 bytes are data
	// 65536 bytes written, 131072 zeroed, verify: ok
	// blksum a877c828bef7b025918d236de283826eda4b12c29a42139a16592e391a5a6276
	// equal: true
}
