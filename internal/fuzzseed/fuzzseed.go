// Package fuzzseed adds seeds to fuzz targets, and writes them into files that are committed. It is for
// tests only.
package fuzzseed

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

var write = flag.Bool("write-seeds", false, "write the seeds of the fuzz targets into testdata")

// Add adds seeds to a fuzz target with one argument of the type []byte. With the flag -write-seeds, it
// also writes them into the folder testdata of the package that is tested.
func Add(f *testing.F, seeds ...[]byte) {
	for i, s := range seeds {
		f.Add(s)
		if !*write {
			continue
		}
		dir := filepath.Join("testdata", "fuzz", f.Name())
		err := os.MkdirAll(dir, 0o777)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed-%02d", i)), fmt.Appendf(nil, "go test fuzz v1\n[]byte(%q)\n", s), 0o666)
		}
		if err != nil {
			f.Fatal(err)
		}
	}
}
