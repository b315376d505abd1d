package job_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// A local raw disk is copied to a qcow2 image, and read back.
func Example() {
	dir, err := os.MkdirTemp("", "")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	src := filepath.Join(dir, "disk.raw")
	if err := os.WriteFile(src, bytes.Repeat([]byte{1}, 1<<20), 0o600); err != nil {
		fmt.Println(err)
		return
	}

	spec := job.Spec{Source: src, Target: filepath.Join(dir, "disk.qcow2"), Verify: true, Digest: digest.SHA256}
	planned, err := job.Plan(context.Background(), spec)
	if err != nil {
		fmt.Println(err, report.Of(err).Hint)
		return
	}
	fmt.Println(planned.Target, planned.Data)

	r, err := job.Run(context.Background(), spec)
	if err != nil {
		fmt.Println(err, report.Of(err).Hint)
		return
	}
	fmt.Println(r.Status, r.BytesWritten, r.Verify.Status, r.Digest.Algorithm)
	// Output:
	// qcow2 file 1048576
	// ok 1048576 ok sha256
}
