// Command hold makes a held copy of SRC to DST, and then publishes it. The file MARK records in
// between that the target is whole. Tests kill the command and run it again.
//
//	hold SRC DST FORMAT MARK
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/transfer/job"
)

func main() {
	if err := run(os.Args[1], os.Args[2], os.Args[3], os.Args[4]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(src, dst, format, markFile string) error {
	ctx := context.Background()
	spec := job.Spec{Source: src, Target: dst, Format: format, Hold: true, Resume: true, RequestSize: 64 << 10}
	mark, err := os.ReadFile(markFile)
	if err != nil {
		var failed error
		spec.Whole = func(m string) {
			killpoint.At("whole")
			mark = []byte(m)
			failed = durable.Replace(markFile, mark, 0o600)
		}
		if _, err := job.Run(ctx, spec); err != nil {
			return err
		}
		if failed != nil {
			return failed
		}
	}
	killpoint.At("publish")
	return job.Publish(ctx, spec, string(mark))
}
