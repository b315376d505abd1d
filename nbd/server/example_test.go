package server_test

import (
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"

	"github.com/vddkcp/vddkcp/nbd"
	nbdclient "github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source/raw"
)

// A program exports a file, read-only, under the name "disk". Several clients may
// read it at once. Here one reads it and then the server ends.
func Example() {
	dir, err := os.MkdirTemp("", "example")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "disk.img")
	if err := os.WriteFile(path, []byte("the content of the disk"), 0o600); err != nil {
		log.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()

	// The disk outlives ctx, so that requests in progress can be answered.
	disk, err := raw.Open(context.Background(), path)
	if err != nil {
		log.Fatal(err)
	}
	defer disk.Close()
	exports := server.Fixed{{Export: server.Export{Name: "disk"}, Disk: disk}}
	s, err := server.New(exports, server.Options{})
	if err != nil {
		log.Fatal(err)
	}
	listener, err := server.Listen(ctx, "unix:"+filepath.Join(dir, "nbd.socket"))
	if err != nil {
		log.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, listener) }()

	// Clients such as qemu-img and nbdcopy take this URI, too.
	uri, err := nbd.ParseURI(server.URI(listener.Addr(), false, "disk"))
	if err != nil {
		log.Fatal(err)
	}
	remote, err := nbdclient.Open(ctx, uri, nbdclient.Options{})
	if err != nil {
		log.Fatal(err)
	}
	content, err := io.ReadAll(io.NewSectionReader(remote, 0, remote.Size()))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", content)
	remote.Close()

	cancel()
	if err := <-ended; err != nil {
		log.Fatal(err)
	}

	// Output:
	// the content of the disk
}
