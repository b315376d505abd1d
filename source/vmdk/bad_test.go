package vmdk_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// readError opens the image and reads it all, and returns the first error.
func readError(t *testing.T, path string) error {
	t.Helper()
	d, err := open(t, path)
	if err != nil {
		return err
	}
	p := make([]byte, 1<<20)
	for off := int64(0); off < d.Size(); off += int64(len(p)) {
		if _, err := d.ReadAt(p, off); err != nil && err != io.EOF {
			return err
		}
	}
	return nil
}

// wantError checks that the error names the file at path and has all of want
// in it.
func wantError(t *testing.T, err error, path string, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want %q", want)
	}
	for _, w := range append(want, path) {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q\nwant %q in it", err, w)
		}
	}
}

// cut returns a function that truncates the file of an image to n bytes.
func cut(n func(*layout) int64) func(*layout) {
	return func(l *layout) { l.file = l.file[:n(l)] }
}

// TestBadSparse opens sparse extents with wrong fields.
func TestBadSparse(t *testing.T) {
	plain := image{capacity: 3000, entries: 8, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}
	redundant := plain
	redundant.redundant = true
	far := redundant // the redundant directory is more than a grain before the other
	far.entries, far.grain, far.grains = 512, 1, grains(512, 0)
	stream := plain
	stream.compressed = true
	footer := stream
	footer.footer = true
	footerBare := footer
	footerBare.noMarkers = true
	for _, c := range []struct {
		name   string
		im     image
		damage func(*layout)
		want   []string
	}{
		{"empty file", plain, cut(func(*layout) int64 { return 0 }), []string{"is empty"}},
		{"truncated magic", plain, cut(func(*layout) int64 { return 3 }), []string{"no VMDK image", `"KDM"`, "offset 0"}},
		{"truncated header", plain, cut(func(*layout) int64 { return 200 }), []string{"header at offset 0 needs 512 bytes, but the file has 200"}},
		{"truncated descriptor", plain, cut(func(*layout) int64 { return 2000 }), []string{"descriptor at sector 1 has 20 sectors, but the file has 2000 bytes"}},
		{"descriptor too long", image{capacity: 3000, descriptor: monolithic + strings.Repeat("ddb.x = \"y\"\n", 1<<20/12)}, func(l *layout) { l.put64(36, 5000) }, []string{"embedded descriptor line ", "the descriptor is longer than 1048576 bytes"}},
		{"descriptor past the end", plain, func(l *layout) { l.put64(28, 1<<60) }, []string{"descriptor at sector 1152921504606846976"}},
		{"truncated in the metadata", plain, cut(func(l *layout) int64 { return 12000 }), []string{"overHead", "12000 bytes", "truncated"}},
		{"truncated grain directory", plain, func(l *layout) { l.put64(64, 0); l.file = l.file[:l.gd+10] }, []string{"grain directory at sector 24 needs 12 bytes, but the file has 12298"}},
		{"grain directory past the end", plain, func(l *layout) { l.put64(56, 1<<56) }, []string{"grain directory at sector 72057594037927936", "truncated"}},
		{"no grain directory", plain, func(l *layout) { l.put64(56, 0) }, []string{"no grain directory (its sector is 0)"}},
		{"both directories past the end", redundant, func(l *layout) { l.put64(56, 1<<56); l.put64(48, 1<<56) }, []string{"grain directory at sector 72057594037927936", "truncated"}},
		{"truncated grain table", plain, func(l *layout) {
			l.put64(64, 0)
			l.put32(l.gd+8, uint32(len(l.file)/sector-1))
			l.file = l.file[:len(l.file)-500]
		}, []string{"grain table 2 at offset", "entry at offset 12296", "needs 32 bytes"}},
		{"grain table past the end", plain, func(l *layout) { l.put32(l.gd+4, 0xffffffff) }, []string{"grain table 1 at offset 2199023255040", "entry at offset 12292", "the file has"}},
		{"truncated grain", plain, func(l *layout) { l.file = l.file[:len(l.file)-1] }, []string{"grain at disk offset 1310720, stored at offset 262144", "327680", "has 327679", "truncated"}},
		{"grain past the end", plain, func(l *layout) { l.put32(l.tables[1]+4, 0xffffffff) }, []string{"grain at disk offset 589824, stored at offset 2199023255040", "has 327680"}},
		{"grain in the header", plain, func(l *layout) { l.put32(l.tables[0], 1) }, []string{"grain at disk offset 0, stored at offset 512", "metadata (overHead), bytes 0 to 65536"}},
		{"grain in a grain table", plain, func(l *layout) { l.put32(l.tables[0], uint32(l.tables[2]/sector)) }, []string{"grain at disk offset 0", "metadata (overHead)"}},
		{"grain in the directory", plain, func(l *layout) {
			l.put64(64, 1)
			l.put32(l.tables[0], uint32(l.gd/sector))
		}, []string{"grain at disk offset 0, stored at offset 12288", "lies in the grain directory, bytes 12288 to 12300"}},
		{"grain over the redundant directory", far, func(l *layout) {
			l.put64(64, 1)
			l.put32(l.tables[0], uint32(l.rgd/sector))
		}, []string{"grain at disk offset 0", "lies in the redundant grain directory"}},
		{"grain size 0", plain, func(l *layout) { l.put64(20, 0) }, []string{"grain size of 0 sectors", "power of two from 1 to 32768"}},
		{"grain size no power of two", plain, func(l *layout) { l.put64(20, 129) }, []string{"grain size of 129 sectors"}},
		{"grain size absurd", plain, func(l *layout) { l.put64(20, 65536) }, []string{"grain size of 65536 sectors"}},
		{"grain size overflows", plain, func(l *layout) { l.put64(20, 1<<63) }, []string{"grain size of 9223372036854775808 sectors"}},
		{"packed grain size absurd", stream, func(l *layout) { l.put64(20, 4096) }, []string{"grain size of 4096 sectors", "1 to 2048"}},
		{"no table entries", plain, func(l *layout) { l.put32(44, 0) }, []string{"0 entries in a grain table"}},
		{"table entries absurd", plain, func(l *layout) { l.put32(44, 1<<31) }, []string{"2147483648 entries in a grain table"}},
		{"capacity absurd", plain, func(l *layout) { l.put64(12, 1<<63) }, []string{"capacity of 9223372036854775808 sectors"}},
		{"capacity beyond the directory", image{capacity: 3000, descriptor: strings.Replace(monolithic, "%d", "1000000000000", 1)}, func(l *layout) { l.put64(12, 1000000000000) }, []string{"grain directory at sector", "needs 61035160 bytes"}},
		{"capacity below the descriptor's", plain, func(l *layout) { l.put64(12, 2999) }, []string{"capacity of 2999 sectors", "descriptor gives the extent 3000"}},
		{"capacity above the descriptor's", plain, func(l *layout) { l.put64(12, 3128) }, []string{"capacity of 3128 sectors", "descriptor gives the extent 3000"}},
		{"version 0", plain, func(l *layout) { l.put32(4, 0) }, []string{"offset 4: version 0, want 1, 2 or 3"}},
		{"version 4", plain, func(l *layout) { l.put32(4, 4) }, []string{"offset 4: version 4"}},
		{"text-mode transfer", plain, func(l *layout) { copy(l.file[73:], "\n \n\n") }, []string{"offset 73: found bytes 0a200a0a, want 0a200d0a", "FTP"}},
		{"compression unknown", plain, func(l *layout) { l.file[77] = 2 }, []string{"compressAlgorithm 2"}},
		{"compression contradictory", stream, func(l *layout) { l.file[77] = 0 }, []string{"compressAlgorithm is 0", "flags 0x30001"}},
		{"no descriptor", image{capacity: 100}, func(l *layout) {}, []string{"without a descriptor"}},

		{"marker of another grain", stream, func(l *layout) { l.put64(l.grains[9], 7) }, []string{"grain at disk offset 589824, stored at offset", "at sector 7 of the extent, want sector 1152"}},
		{"marker without bytes", stream, func(l *layout) { l.put32(l.grains[9]+8, 0) }, []string{"grain at disk offset 589824", "a length of 0 compressed bytes"}},
		{"marker with absurd size", stream, func(l *layout) { l.put32(l.grains[9]+8, 1<<31) }, []string{"grain at disk offset 589824", "a length of 2147483648 compressed bytes, want 1 to 132096"}},
		{"truncated compressed grain", stream, func(l *layout) { l.file = l.file[:l.grains[20]+100] }, []string{"grain at disk offset 1310720", "compressed bytes of the grain end at", "truncated"}},
		{"truncated marker", stream, func(l *layout) { l.file = l.file[:l.grains[20]+5] }, []string{"grain at disk offset 1310720", "truncated"}},
		{"corrupt compressed grain", stream, func(l *layout) { l.file[l.grains[1]+3000] ^= 0x55 }, []string{"grain at disk offset 65536, stored at offset", "compressed bytes of the grain are damaged"}},
		{"corrupt checksum", stream, func(l *layout) {
			le := l.file[l.grains[1]+8:]
			l.file[l.grains[1]+12+int64(le[0])+int64(le[1])<<8-1] ^= 1
		}, []string{"grain at disk offset 65536", "checksum"}},
		{"no zlib stream", stream, func(l *layout) { l.file[l.grains[0]+12] = 0 }, []string{"grain at disk offset 0", "zlib header"}},
		{"grain that is too long", image{capacity: 3000, compressed: true, descriptor: monolithic, grains: map[int64][]byte{3: make([]byte, 65537)}}, func(*layout) {}, []string{"grain at disk offset 196608", "more than 65536 bytes"}},
		{"last grain that is too long", image{capacity: 200, compressed: true, descriptor: monolithic, grains: map[int64][]byte{1: make([]byte, 65537)}}, func(*layout) {}, []string{"grain at disk offset 65536", "more than 65536 bytes"}},
		{"grain that is a bomb", image{capacity: 3000, compressed: true, descriptor: monolithic, grains: map[int64][]byte{3: make([]byte, 8<<20)}}, func(*layout) {}, []string{"grain at disk offset 196608", "more than 65536 bytes"}},
		{"grain that is too short", image{capacity: 3000, compressed: true, descriptor: monolithic, grains: map[int64][]byte{3: make([]byte, 65535)}}, func(*layout) {}, []string{"grain at disk offset 196608", "unpacks to 65535 bytes, want 65536"}},
		{"last grain that is too short", image{capacity: 200, compressed: true, descriptor: monolithic, grains: map[int64][]byte{1: make([]byte, 71*512)}}, func(*layout) {}, []string{"grain at disk offset 65536", "unpacks to 36352 bytes, want 36864"}},
		{"compressed grain in the header", stream, func(l *layout) { l.put32(l.tables[0], 1) }, []string{"grain at disk offset 0, stored at offset 512", "overHead"}},
		{"compressed grain in the header after another", stream, func(l *layout) { l.put32(l.tables[0]+4, 2) }, []string{"grain at disk offset 65536, stored at offset 1024", "overHead"}},

		{"stream cut before the footer", footer, func(l *layout) { l.file = l.file[:l.header-sector] }, []string{"footer", "found", "truncated"}},
		{"stream cut in the footer", footer, func(l *layout) { l.file = l.file[:l.header+100] }, []string{"footer", "truncated"}},
		{"stream cut in a grain", footer, func(l *layout) { l.file = l.file[:l.grains[9]+100] }, []string{"footer", "truncated"}},
		{"footer of zeros", footer, func(l *layout) { l.file = append(l.file[:2*sector*10], make([]byte, 100000)...) }, []string{"no footer in the last 65536 bytes"}},
		{"footer without a directory", footerBare, func(l *layout) { l.put64(l.header+56, 1<<64-1) }, []string{"footer at offset", "no grain directory"}},
		{"footer of another version", footer, func(l *layout) { l.put32(l.header+4, 9) }, []string{"footer at offset", "version 9"}},
		{"footer only", footer, func(l *layout) { l.file = l.file[:sector*11] }, []string{"the descriptor at sector"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.im.build()
			c.damage(l)
			path := write(t, t.TempDir(), "bad.vmdk", l.file)
			wantError(t, readError(t, path), path, c.want...)
		})
	}
}

// TestBadDescriptor opens descriptors that are invalid, and descriptors of disks that
// are not supported.
func TestBadDescriptor(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "flat", make([]byte, 100*sector))
	write(t, dir, "cowd", []byte("COWD\x01\x00\x00\x00 and so on"))
	write(t, dir, "sesparse", []byte("\xbe\xba\xfe\xca\x00\x00\x00\x00 and so on"))
	write(t, dir, "s001", image{capacity: 1000}.build().file)
	for _, c := range []struct {
		name, text string // after the first line
		want       []string
	}{
		{"no extents", "version=1\nCID=1\n", []string{"no extents"}},
		{"empty extents", "RW 0 FLAT \"flat\"\n", []string{"no extents"}},
		{"neither key nor extent", "CID=1\nWR 100 FLAT \"flat\"\n", []string{"line 3", `found "WR 100 FLAT`, "want KEY=VALUE"}},
		{"sectors missing", "RW\n", []string{"line 2", `number of sectors ""`}},
		{"sectors not a number", "RW x FLAT \"flat\"\n", []string{"line 2", `number of sectors "x"`}},
		{"sectors negative", "RW -5 FLAT \"flat\"\n", []string{"line 2", `"-5"`}},
		{"sectors absurd", "RW 99999999999999999 FLAT \"flat\"\n", []string{"line 2", "99999999999999999 is more than 8 EiB"}},
		{"sectors overflow", "RW 18014398509481983 ZERO\nRW 1 ZERO\n", []string{"line 3", "8 EiB"}},
		{"type missing", "RW 100\n", []string{"line 2", "has no type"}},
		{"type unknown", "RW 100 QCOW \"flat\"\n", []string{"line 2", `"QCOW"`, "want FLAT, SPARSE, ZERO, VMFS, VMFSSPARSE or SESPARSE"}},
		{"name missing", "RW 100 FLAT\n", []string{"line 2", "FLAT extent has no file name"}},
		{"name not closed", "RW 100 FLAT \"flat\n", []string{"line 2", "closing quote"}},
		{"offset no number", "RW 100 FLAT \"flat\" first\n", []string{"line 2", `offset "first"`}},
		{"flat truncated", "RW 101 FLAT \"flat\"\n", []string{"line 2", dir + "/flat", "needs 51712 bytes from offset 0", "the file has 51200", "truncated"}},
		{"flat offset past the end", "RW 1 FLAT \"flat\" 100\n", []string{"line 2", "from offset 51200", "the file has 51200"}},
		{"flat offset absurd", "RW 18014398509481983 FLAT \"flat\" 18014398509481983\n", []string{"line 2", "the file has 51200"}},
		{"extent missing", "RW 10 FLAT \"flat\"\nRW 10 FLAT \"away\"\n", []string{"line 3", `extent "away"`, dir + "/away: no such file"}},
		{"extent is a folder", "RW 10 FLAT \".\"\n", []string{"line 2", "is a directory"}},
		{"extent is no sparse one", "RW 10 SPARSE \"flat\"\n", []string{"line 2", dir + "/flat", "no sparse extent", `found "\x00\x00\x00\x00\x00\x00\x00\x00" at offset 0, want "KDMV" (SPARSE), "COWD" (VMFSSPARSE)`}},
		{"extent is smaller", "RW 1001 SPARSE \"s001\"\n", []string{"line 2", dir + "/s001", "capacity of 1000 sectors", "gives the extent 1001"}},
		{"extent is larger", "RW 800 SPARSE \"s001\"\n", []string{"line 2", "capacity of 1000 sectors", "gives the extent 800"}},
		{"COWD", "createType=\"vmfsSparse\"\nRW 100 VMFSSPARSE \"cowd\"\n", []string{"line 3", dir + "/cowd", "COWD header at offset 0 needs 2048 bytes"}},
		{"COWD as SPARSE", "RW 100 SPARSE \"cowd\"\n", []string{"line 2", dir + "/cowd", "COWD header at offset 0 needs 2048 bytes"}},
		{"seSparse", "RW 100 SESPARSE \"sesparse\"\n", []string{"line 2", dir + "/sesparse", "seSparse header at offset 0 needs 512 bytes"}},
		{"seSparse missing", "RW 100 SESPARSE \"away\"\n", []string{dir + "/away: no such file"}},
		{"raw device mapping", "RW 100 VMFSRDM \"flat\"\n", []string{`line 2: extent "flat" of type VMFSRDM is not supported: it is a raw device mapping of an ESXi host`, "VDDK"}},
		{"raw device", "RW 10 FLAT \"flat\"\nRW 100 vmfsRaw \"flat\"\n", []string{`line 3: extent "flat" of type VMFSRAW is not supported: it is a raw device mapping`, "not supported"}},
		{"vmfsRawDeviceMap", "createType=\"vmfsRawDeviceMap\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "vmfsRawDeviceMap" is not supported, because it stands for a raw device mapping`, "not supported"}},
		{"vmfsPassthroughRawDeviceMap", "createType=\"vmfsPassthroughRawDeviceMap\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "vmfsPassthroughRawDeviceMap" is not supported, because it stands for a raw device mapping`}},
		{"vmfsRDM", "createType=\"vmfsRDM\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "vmfsRDM" is not supported, because it stands for a raw device mapping`}},
		{"vmfsRDMP", "createType=\"vmfsRDMP\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "vmfsRDMP" is not supported, because it stands for a raw device mapping`}},
		{"vmfsRaw", "createType=\"vmfsRaw\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "vmfsRaw" is not supported, because it stands for a raw device mapping`}},
		{"fullDevice", "createType=\"fullDevice\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "fullDevice" is not supported, because it stands for a physical device`, "not supported", "copy from the device itself"}},
		{"partitionedDevice", "createType=\"PartitionedDevice\"\nRW 100 FLAT \"flat\"\n", []string{`line 2: createType "PartitionedDevice" is not supported, because it stands for a physical device`, "not supported"}},
		{"device of Windows", "createType=\"custom\"\nRW 63 FLAT \"flat\" 0\nRW 100 FLAT \"\\\\.\\PhysicalDrive0\" 63\n", []string{`line 4: extent "\\\\.\\PhysicalDrive0" is not supported: it is a physical device`, "copy from the device itself"}},
		{"volume of Windows", "RW 100 FLAT \"\\\\?\\Volume{1}\"\n", []string{`line 2: extent "\\\\?\\Volume{1}" is not supported: it is a physical device`}},
		{"device of Linux", "createType=\"monolithicFlat\"\nRW 100 FLAT \"/dev/sda\" 63\n", []string{`line 3: extent "/dev/sda" is not supported: it is a physical device`, "copy from the device itself"}},
		{"device as SPARSE", "RW 100 SPARSE \"/DEV/mapper/x\"\n", []string{`line 2: extent "/DEV/mapper/x" is not supported: it is a physical device`}},
		{"encrypted", "RW 100 FLAT \"flat\"\nencryption.keySafe = \"vmware:key/list/(pair/(null/...\"\n", []string{"line 3: the disk is encrypted (encryption.keySafe)", "not supported", "decrypt it"}},
		{"encrypted data", "encryption.data=\"x\"\nRW 100 FLAT \"flat\"\n", []string{"line 2: the disk is encrypted (encryption.data)"}},
		{"encrypted by ESXi", "RW 100 FLAT \"flat\"\nddb.iofilters = \"vmwarevmcrypt\"\n", []string{`line 3: the disk is encrypted (ddb.iofilters "vmwarevmcrypt")`}},
		{"parentCID no number", "parentCID=xyz\nRW 100 FLAT \"flat\"\n", []string{"line 2", `parentCID "xyz"`, "hexadecimal"}},
		{"parentCID too long", "parentCID=4294967296\nRW 100 FLAT \"flat\"\n", []string{"line 2", `parentCID "4294967296"`}},
		{"parent with a CID that is no number", "parentCID=abc\nparentFileNameHint=\"badcid.vmdk\"\nRW 100 FLAT \"flat\"\n", []string{"parentCID is 00000abc", dir + "/badcid.vmdk is missing or unreadable"}},
		{"encoding unknown", "encoding=\"GBK\"\nRW 100 FLAT \"\xd6\xd0\"\n", []string{"line 3", `"GBK"`, "line 2 declares and which is not supported: want UTF-8"}},
		{"long line", "x=\"" + strings.Repeat("y", 20000) + "\"\n", []string{"line 2", "longer than 16384 bytes"}},
		{"binary", "\x01\x02\x03\n", []string{"line 2", `found "\x01\x02\x03"`}},

		{"parent missing", "CID=1\nparentCID=2\nparentFileNameHint=\"away.vmdk\"\nRW 100 FLAT \"flat\"\n", []string{`parent "away.vmdk"`, dir + "/away.vmdk: no such file"}},
		{"parent not named", "CID=1\nparentCID=2\nRW 100 FLAT \"flat\"\n", []string{"parentCID 00000002", "no parentFileNameHint"}},
		{"parent denied", "CID=1\nparentCID=ffffffff\nparentFileNameHint=\"base.vmdk\"\nRW 100 FLAT \"flat\"\n", []string{`"base.vmdk"`, "says that the image has no parent"}},
		{"parent is no image", "CID=1\nparentCID=2\nparentFileNameHint=\"flat\"\nRW 100 FLAT \"flat\"\n", []string{`parent "flat"`, "no VMDK image"}},
		{"parent of another CID", "CID=1\nparentCID=abc\nparentFileNameHint=\"base.vmdk\"\nRW 100 FLAT \"flat\"\n", []string{"parentCID is 00000abc", dir + "/base.vmdk is 0000beef"}},
		{"parent without a CID", "CID=1\nparentCID=abc\nparentFileNameHint=\"nocid.vmdk\"\nRW 100 FLAT \"flat\"\n", []string{"parentCID is 00000abc", dir + "/nocid.vmdk is missing"}},
		{"parent is itself", "CID=1\nparentCID=1\nparentFileNameHint=\"bad.vmdk\"\nRW 100 FLAT \"flat\"\n", []string{"loops"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			write(t, dir, "base.vmdk", []byte("# Disk DescriptorFile\nCID=BEEF\nparentCID=ffffffff\nRW 100 FLAT \"flat\"\n"))
			write(t, dir, "nocid.vmdk", []byte("# Disk DescriptorFile\nRW 100 FLAT \"flat\"\n"))
			write(t, dir, "badcid.vmdk", []byte("# Disk DescriptorFile\nCID=xyz\nRW 100 FLAT \"flat\"\n"))
			path := write(t, dir, "bad.vmdk", []byte("# Disk DescriptorFile\n"+c.text))
			if c.name == "parent is itself" {
				_, err := openChain(t, path)
				wantError(t, err, path, c.want...)
				return
			}
			_, err := open(t, path)
			wantError(t, err, path, c.want...)
			// The same descriptor is also tested inside a sparse extent.
			if strings.Contains(c.text, "RW 100 FLAT \"flat\"") || len(c.text) > 5000 {
				path := write(t, dir, "embedded.vmdk", image{capacity: 100, descriptor: "# Disk DescriptorFile\n" + c.text}.build().file)
				_, err := open(t, path)
				wantError(t, err, path, c.want...)
			}
		})
	}
}

// TestHugeLine opens descriptors with a line of up to 1 TiB, of which only a small part
// may be read.
func TestHugeLine(t *testing.T) {
	path := write(t, t.TempDir(), "bad.vmdk", []byte("# Disk DescriptorFile\nversion=1\nx="))
	for _, fill := range []int64{1 << 30, 1 << 20, 1 << 40} {
		if err := os.Truncate(path, fill); err != nil {
			t.Fatal(err)
		}
		f, err := raw.Open(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		// The file is sparse, and the line must not end at its zeros.
		d := &filled{Disk: f}
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		_, err = vmdk.Open(t.Context(), path, d, opener, vmdk.Options{})
		runtime.ReadMemStats(&after)
		wantError(t, err, path, "line 3: the line is longer than 16384 bytes")
		if n := after.TotalAlloc - before.TotalAlloc; n > 8<<20 {
			t.Errorf("%d bytes allocated", n)
		}
		if d.most > 2<<20 {
			t.Errorf("%d bytes read at once", d.most)
		}
	}
	path = write(t, t.TempDir(), "long.vmdk", bytes.Repeat([]byte("# Disk DescriptorFile\n"), 1<<20/20))
	_, err := open(t, path)
	wantError(t, err, path, "descriptor is longer than 1048576 bytes")
}

// filled is a file whose zeros read as the letter x.
type filled struct {
	*raw.Disk
	most int
}

func (f *filled) ReadAt(p []byte, off int64) (int, error) {
	f.most = max(f.most, len(p))
	n, err := f.Disk.ReadAt(p, off)
	for i := range p {
		if p[i] == 0 {
			p[i] = 'x'
		}
	}
	return n, err
}

// TestLoop opens chains that contain an image twice, also under another name.
func TestLoop(t *testing.T) {
	for _, n := range []int{1, 2, 5} {
		dir := t.TempDir()
		for i := range n {
			write(t, dir, fmt.Sprintf("%d.vmdk", i), fmt.Appendf(nil, "# Disk DescriptorFile\nCID=1\nparentCID=1\nparentFileNameHint=\"%d.vmdk\"\nRW 10 ZERO\n", i+1))
		}
		if err := os.Link(filepath.Join(dir, "0.vmdk"), filepath.Join(dir, fmt.Sprintf("%d.vmdk", n))); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "0.vmdk")
		_, err := openChain(t, path)
		wantError(t, err, path, "loops", fmt.Sprintf("%d.vmdk", n))
	}
}

// TestLongChain tests that a chain which is too long is refused before the process runs
// out of file descriptors.
func TestLongChain(t *testing.T) {
	dir := t.TempDir()
	for i := range 300 {
		write(t, dir, fmt.Sprintf("%d.vmdk", i), fmt.Appendf(nil, "# Disk DescriptorFile\nCID=1\nparentCID=1\nparentFileNameHint=\"%d.vmdk\"\nRW 10 ZERO\n", i+1))
	}
	path := filepath.Join(dir, "0.vmdk")
	_, err := openChain(t, path)
	wantError(t, err, path, "255.vmdk", "at most 256")
}

// TestOpenClosesFiles counts the open files, all of which must be closed if Open fails.
func TestOpenClosesFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "flat", make([]byte, 100*sector))
	write(t, dir, "base.vmdk", []byte("# Disk DescriptorFile\nCID=2\nRW 100 FLAT \"flat\"\n"))
	for name, text := range map[string]string{
		"good":             "CID=1\nparentCID=2\nparentFileNameHint=\"base.vmdk\"\nRW 10 FLAT \"flat\"\nRW 10 FLAT \"flat\" 10\n",
		"extent truncated": "RW 10 FLAT \"flat\"\nRW 1000 FLAT \"flat\"\n",
		"extent missing":   "RW 10 FLAT \"flat\"\nRW 10 FLAT \"away\"\n",
		"another CID":      "CID=1\nparentCID=3\nparentFileNameHint=\"base.vmdk\"\nRW 10 FLAT \"flat\"\n",
		"no descriptor":    "?\n",
	} {
		open := map[string]int{}
		var count source.Opener
		count = func(ctx context.Context, from, name, format string) (source.Disk, error) {
			path := filepath.Join(dir, name)
			f, err := raw.Open(ctx, path)
			if err != nil {
				return nil, err
			}
			open[name]++
			c := &counted{f, func() { open[name]-- }}
			if format == "raw" {
				return c, nil
			}
			return vmdk.Open(ctx, path, c, count, vmdk.Options{})
		}
		write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\n"+text))
		d, err := count(t.Context(), "", "x.vmdk", "vmdk")
		if (err == nil) != (name == "good") {
			t.Fatalf("%s: %v", name, err)
		}
		if err == nil {
			if open["flat"] != 2 { // one for each image that names it
				t.Errorf("%s: open files %v", name, open)
			}
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		}
		for file, n := range open {
			if n != 0 {
				t.Errorf("%s: %s is open %d times", name, file, n)
			}
		}
	}
}

type counted struct {
	source.Disk
	closed func()
}

func (c *counted) Close() error {
	c.closed()
	return c.Disk.Close()
}

// TestReadErrors reads from a file whose reads fail, and from a file that becomes
// shorter.
func TestReadErrors(t *testing.T) {
	for _, packed := range []bool{false, true} {
		im := image{capacity: 3000, compressed: packed, grains: grains(65536, 1, 2, 3), descriptor: monolithic}
		l := im.build()
		path := write(t, t.TempDir(), "x.vmdk", l.file)
		d := mustOpen(t, path)
		content(t, d) // so that the grain tables are known
		if err := os.Truncate(path, l.grains[1]+10); err != nil {
			t.Fatal(err)
		}
		_, err := d.ReadAt(make([]byte, 1<<20), 0)
		wantError(t, err, path, "grain at disk offset 65536, stored at offset", "when it was opened")
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v", err)
		}
		if _, err := d.ReadAt(make([]byte, 65536), 0); err != nil { // it lives on
			t.Error(err)
		}
	}
}

// TestProbe tests that Probe recognizes images and no other files.
func TestProbe(t *testing.T) {
	for head, want := range map[string]bool{
		"KDMV": true, "COWD": true, "\xbe\xba\xfe\xca\x00\x00\x00\x00": true,
		"# Disk DescriptorFile\n": true, "# Disk DescriptorFile": true, "\xef\xbb\xbf# Disk DescriptorFile\r\nversion=1\r\n": true,
		"\n\r\n  \n# disk descriptorfile \n": true, "#DISK DescriptorFile\n": true, "# made by me\n# Disk DescriptorFile\n": true,
		"# comment\nversion=1\nCID=1\n": true, "version = 2\n": true,
		"": false, "KDM": false, "\n": false, "#!/bin/sh\n": false, "# comment\nversion=x\n": false, "# comment\nKDMV": false,
		"QFI\xfb": false, "\xbe\xba\xfe\xca\x00\x00\x00\x01": false, "\x00\x00": false, "text # Disk DescriptorFile": false,
	} {
		if got := vmdk.Probe([]byte(head)); got != want {
			t.Errorf("Probe(%q) = %v", head, got)
		}
	}
}

// TestIdentity tests that the identity depends on each file of the image, and that its
// proof is the weakest proof of the files.
func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "flat", make([]byte, 100*sector))
	write(t, dir, "base.vmdk", []byte("# Disk DescriptorFile\nCID=2\nRW 100 FLAT \"flat\"\n"))
	path := write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\nCID=1\nparentCID=2\nparentFileNameHint=\"base.vmdk\"\nRW 100 ZERO\n"))
	var ids []string
	for _, touch := range []string{"", "flat", "base.vmdk", "x.vmdk"} {
		if touch != "" {
			b, err := os.ReadFile(filepath.Join(dir, touch))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(filepath.Join(dir, touch)); err != nil {
				t.Fatal(err)
			}
			write(t, dir, touch+"~", nil) // so that the new file is another one
			write(t, dir, touch, b)
		}
		id, proof, err := mustOpen(t, path).Identity(t.Context())
		if err != nil || proof != "mtime" || slices.Contains(ids, id) {
			t.Errorf("%q touched: %q, %q, %v; before: %q", touch, id, proof, err, ids)
		}
		ids = append(ids, id)
	}
}
