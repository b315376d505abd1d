// Command image writes a container image with vddkcp for several architectures, as an archive of
// an OCI image layout. It needs no container engine and no root. Its input is Debian packages,
// which it unpacks but never runs, and files that it adds to them:
//
//	image -out FILE -version VERSION -commit HASH -time SECONDS DIR...
//
// The name of each DIR is an architecture, amd64 or arm64. DIR/debs contains Debian packages, and
// DIR/files contains the files to add, with the folders that they have in the image.
//
// The same input makes the same bytes. The time, in seconds since 1970, is the time of the image
// and of all files that do not come from a Debian package.
package main

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

func main() {
	var o options
	var seconds int64
	flag.StringVar(&o.out, "out", "", "the archive to write")
	flag.StringVar(&o.version, "version", "", "the version of vddkcp")
	flag.StringVar(&o.commit, "commit", "", "the commit of vddkcp")
	flag.Int64Var(&seconds, "time", 0, "the time of the image, in seconds since 1970")
	flag.Parse()
	o.time = time.Unix(seconds, 0).UTC()
	if o.out == "" || flag.NArg() == 0 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(o, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

type options struct {
	out, version, commit string
	time                 time.Time
}

// run writes the archive with one image for each of the folders dirs.
func run(o options, dirs []string) error {
	l := newLayout(o)
	var manifests []descriptor
	for _, dir := range dirs {
		arch := filepath.Base(dir)
		m, err := l.addImage(arch, filepath.Join(dir, "debs"), filepath.Join(dir, "files"))
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
		manifests = append(manifests, m)
	}
	return l.finish(manifests)
}
