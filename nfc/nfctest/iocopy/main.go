// Command iocopy sends a file over a connection with io.Copy. "make bench" compares the time that this
// takes with copies over NFC.
//
//	iocopy [-tls] -serve FILE    prints an address and sends FILE to everyone who connects to it
//	iocopy [-tls] ADDRESS        connects to the address, and reads and discards what comes
package main

import (
	"crypto/tls"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http/httptest"
	"os"
)

func main() {
	secure := flag.Bool("tls", false, "use TLS")
	file := flag.String("serve", "", "send this `FILE`")
	flag.Parse()
	var err error
	if *file != "" {
		err = serve(*file, *secure)
	} else {
		err = receive(flag.Arg(0), *secure)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "iocopy:", err)
		os.Exit(1)
	}
}

func serve(file string, secure bool) error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	if secure {
		web := httptest.NewTLSServer(nil) // has a certificate
		listener = tls.NewListener(listener, &tls.Config{Certificates: web.TLS.Certificates})
		web.Close()
	}
	for {
		c, err := listener.Accept()
		if err != nil {
			return err
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		_, err = copyTo(c, f)
		f.Close()
		c.Close()
		if err != nil {
			return err
		}
	}
}

func receive(address string, secure bool) error {
	c, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	if secure {
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
	}
	defer c.Close()
	n, err := copyTo(io.Discard, c)
	fmt.Println(n, "bytes")
	return err
}

// copyTo copies with the usual buffer of io.Copy, 32 KiB. Without the structs, io.Copy would choose
// sendfile, which sends a file without reading it into memory, or a smaller buffer.
func copyTo(w io.Writer, r io.Reader) (int64, error) {
	return io.Copy(struct{ io.Writer }{w}, struct{ io.Reader }{r})
}
