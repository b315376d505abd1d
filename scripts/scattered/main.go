// Command scattered makes a monolithicSparse VMDK, for benchmarks of programs that read
// grain tables. The argument GIB is the size of the disk in GiB. Each grain is allocated
// with a probability of PERCENT percent. Grains that are neighbours on the disk are not
// neighbours in the file. The content of all grains is a hole in the file, so that even
// terabytes of grains take no space.
//
//	go run ./scripts/scattered FILE GIB PERCENT
//
// With -raw, scattered makes a sparse raw disk of GIB GiB. It contains DATA GiB of data,
// in pieces of 64 KiB that are scattered over the disk:
//
//	go run ./scripts/scattered -raw FILE GIB DATA
package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strconv"
)

const (
	sector  = 512
	grain   = 128 // sectors
	entries = 512 // of a grain table

	descriptorSectors = 20
	directorySector   = 1 + descriptorSectors
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, "scattered: %v\n", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) == 4 && args[0] == "-raw" {
		return scatter(args[1], args[2], args[3])
	}
	if len(args) != 3 {
		return fmt.Errorf("usage: scattered FILE GIB PERCENT")
	}
	gib, err := strconv.ParseInt(args[1], 10, 64)
	if err != nil || gib < 1 || gib > 2048 {
		return fmt.Errorf("GIB %s: want 1 to 2048", args[1])
	}
	percent, err := strconv.ParseInt(args[2], 10, 64)
	if err != nil || percent < 0 || percent*gib > 100*2040 {
		return fmt.Errorf("PERCENT %s: want 0 or more, and at most 2040 GiB of data in a disk of %d GiB", args[2], gib)
	}
	f, err := os.Create(args[0])
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	size := write(w, gib<<30/sector, int(percent))
	if err := w.Flush(); err != nil {
		return err
	}
	if err := f.Truncate(size); err != nil {
		return err
	}
	return f.Close()
}

// The function scatter makes the sparse raw disk that the flag -raw asks for. The
// parameters size and data are the arguments GIB and DATA of the command.
func scatter(path, size, data string) error {
	const piece = 64 << 10
	gib, err := strconv.ParseInt(size, 10, 64)
	if err != nil || gib < 1 || gib > 1<<20 {
		return fmt.Errorf("GIB %s: want 1 to 1048576", size)
	}
	filled, err := strconv.ParseInt(data, 10, 64)
	if err != nil || filled < 1 || filled > gib {
		return fmt.Errorf("DATA %s: want 1 to %d", data, gib)
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := f.Truncate(gib << 30); err != nil {
		return err
	}
	r := rand.New(rand.NewPCG(1, 2))
	random := rand.NewChaCha8([32]byte{1})
	p := make([]byte, piece)
	n := filled << 30 / piece
	stride := gib << 30 / piece / n
	for i := range n {
		random.Read(p)
		if _, err := f.WriteAt(p, (i*stride+r.Int64N(stride))*piece); err != nil {
			return err
		}
	}
	return f.Close()
}

// The function write writes the VMDK except for the content of its grains. The parameter
// capacity is the size of the disk in sectors. The result is the size that the file
// should have, in bytes. Errors of writing to w are ignored here, because the caller
// calls w.Flush next, which returns the first of these errors.
func write(w *bufio.Writer, capacity int64, percent int) int64 {
	grains := capacity / grain
	tables := (grains + entries - 1) / entries
	firstTable := roundUp(directorySector*sector+tables*4, sector) / sector
	overhead := roundUp(firstTable+tables*entries*4/sector, grain)
	le := binary.LittleEndian

	header := make([]byte, sector)
	copy(header, "KDMV")
	le.PutUint32(header[4:], 1)
	le.PutUint32(header[8:], 1) // newline detection
	le.PutUint64(header[12:], uint64(capacity))
	le.PutUint64(header[20:], grain)
	le.PutUint64(header[28:], 1)
	le.PutUint64(header[36:], descriptorSectors)
	le.PutUint32(header[44:], entries)
	le.PutUint64(header[56:], directorySector)
	le.PutUint64(header[64:], uint64(overhead))
	copy(header[73:], "\n \r\n")
	w.Write(header)
	descriptor := make([]byte, descriptorSectors*sector)
	copy(descriptor, fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW %d SPARSE \"scattered.vmdk\"\nddb.adapterType = \"lsilogic\"\n", capacity))
	w.Write(descriptor)
	for i := range tables {
		binary.Write(w, le, uint32(firstTable+i*entries*4/sector))
	}
	io.CopyN(w, zeros{}, firstTable*sector-directorySector*sector-tables*4)

	// Each of the two loops below draws the same random numbers. The first loop counts the
	// allocated grains. The second loop writes the grain tables. They contain the place of
	// each grain in the file, which depends on the number of allocated grains.
	has := func() func() bool {
		r := rand.New(rand.NewPCG(1, 2))
		return func() bool { return r.IntN(100) < percent }
	}
	n := int64(0)
	for next, g := has(), int64(0); g < grains; g++ {
		if next() {
			n++
		}
	}
	const step = 1_000_003 // a prime: each place is used once, and neighbours on the disk lie far apart in the file
	place := int64(0)
	table := make([]byte, entries*4)
	for next, t := has(), int64(0); t < tables; t++ {
		clear(table)
		for e := range min(int64(entries), grains-t*entries) {
			if next() {
				le.PutUint32(table[e*4:], uint32(overhead+place*grain))
				place = (place + step) % n
			}
		}
		w.Write(table)
	}
	return (overhead + n*grain) * sector
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}
