package inflate

import (
	"bytes"
	"compress/flate"
	"compress/zlib"
	"fmt"
	"go/build"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const grain = 64 << 10

// grains returns n units of 64 KiB with the content of a typical disk: sources, machine
// code and text, some of them with noise or zeros.
func grains(t testing.TB, n int) [][]byte {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	exe, err := os.ReadFile(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	source := sources(n * grain / 2)
	all := make([][]byte, n)
	for i := range all {
		var g []byte
		switch {
		case i%8 == 7: // the end of one file, unused space, and another file
			cut := rnd.IntN(grain / 2)
			g = append(g, pick(rnd, exe)[:cut]...)
			g = append(g, make([]byte, 4096-cut%4096)...)
			g = append(g, text(rnd, grain-len(g))...)
		case i%8 == 6:
			g = pick(rnd, exe)
			for j := grain / 4; j < grain/2; j++ {
				g[j] = byte(rnd.Uint32())
			}
		case i%2 == 0 && len(source) >= grain:
			g = pick(rnd, source)
		default:
			g = pick(rnd, exe)
		}
		all[i] = g
	}
	return all
}

// pick returns a copy of a random unit of b.
func pick(rnd *rand.Rand, b []byte) []byte {
	at := rnd.IntN(len(b)/grain) * grain
	return bytes.Clone(b[at : at+grain])
}

// sources returns about n bytes of the source code of Go, or nothing if it is not
// installed.
func sources(n int) []byte {
	files, _ := filepath.Glob(filepath.Join(build.Default.GOROOT, "src", "[a-n]*", "*.go"))
	var b []byte
	for _, name := range files {
		if len(b) >= n {
			break
		}
		f, _ := os.ReadFile(name)
		b = append(b, f...)
	}
	return b
}

// text returns n bytes of log lines.
func text(rnd *rand.Rand, n int) []byte {
	var b bytes.Buffer
	for b.Len() < n {
		fmt.Fprintf(&b, "2024-03-%02d host%d kernel: [%d.%06d] sd %d:0:0:0: [sda] %d blocks\n",
			rnd.IntN(28)+1, rnd.IntN(4), rnd.IntN(1e4), rnd.IntN(1e6), rnd.IntN(8), rnd.Uint32())
	}
	return b.Bytes()[:n]
}

func deflated(t testing.TB, p []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(p)
	w.Close()
	return b.Bytes()
}

func zlibbed(t testing.TB, p []byte, level int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zlib.NewWriterLevel(&b, level)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(p)
	w.Close()
	return b.Bytes()
}
