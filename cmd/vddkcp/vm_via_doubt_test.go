package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// wrongByte is the content of a disk of which one byte is wrong.
type wrongByte struct {
	io.ReaderAt
	at int64
}

func (c wrongByte) ReadAt(p []byte, off int64) (int, error) {
	n, err := c.ReaderAt.ReadAt(p, off)
	if off <= c.at && c.at < off+int64(n) {
		p[c.at-off] ^= 0xff
	}
	return n, err
}

// opensAs returns the option with which the hosts open disks as the function change says.
func opensAs(change func(file string, open func(file string) (*nfctest.Disk, error)) (*nfctest.Disk, error)) vspheretest.Option {
	return vspheretest.Configure(func(o *vspheretest.Options) {
		o.NFC = func(_ string, h *nfctest.Options) {
			open := h.Open
			h.Open = func(file string) (*nfctest.Disk, error) { return change(file, open) }
		}
	})
}

// TestVMViaNFCMisreads copies a disk of which the host returns a wrong byte at the first opening
// only. The copy may not get its name, also if it is continued through VDDK.
func TestVMViaNFCMisreads(t *testing.T) {
	vmStates(t)
	misreads := func() vspheretest.Option {
		var opened atomic.Int32
		return opensAs(func(file string, open func(string) (*nfctest.Disk, error)) (*nfctest.Disk, error) {
			d, err := open(file)
			if err == nil && opened.Add(1) == 1 {
				d.Content = wrongByte{d.Content, 70000}
			}
			return d, err
		})
	}
	t.Run("whole", func(t *testing.T) {
		v := newNFC(t, misreads())
		r := v.exits(3, v.startCommand(nil, nil, "copy", "vm:web01#1", "x.raw", "--report", "r.json"))
		v.says(r, "the check after the copy has found a difference: 1 of 16 places of the source, read again over a new connection, differs from the target: first difference at byte 70000")
		if strings.Contains(r.stderr, "--resume") {
			t.Errorf("a copy that is wrong shall be continued: %s", r.stderr)
		}
		if _, err := os.Lstat(v.path("x.raw")); err == nil {
			t.Error("the wrong copy has got its name")
		}
		if report := v.reportOf("r.json"); report.Status != "mismatch" || report.PlacesAgain != 16 {
			t.Errorf("%+v", report)
		}
		v.left(0)
	})
	t.Run("continued", func(t *testing.T) {
		v := newVM(t, vspheretest.WithNFC(), misreads())
		args := append([]string{"copy", "vm:web01#1", "x.raw", "--keep-snapshot", "--progress", "none"}, v.login()...)
		slow := []string{"--request-size", "64KiB", "--depth", "1", "--rate-limit", "1MiB"}
		first := append(args[:len(args)-2:len(args)-2], append(slow, "--via", "nfc")...) // without --libdir
		p := v.startLine([]string{"checkpoint:4"}, nil, first...)
		p.at("checkpoint:4")
		p.kill()
		r := v.exits(3, v.startLine(nil, nil, append(args, "--resume", "--via", "vddk")...))
		v.says(r, "continuing an earlier copy", "1 of 16 places of the source", "first difference at byte 70000")
	})
}

// TestVMViaNFCOtherDisk copies a disk whose host opens another disk of the same size.
func TestVMViaNFCOtherDisk(t *testing.T) {
	vmStates(t)
	v := newNFC(t, opensAs(func(file string, open func(string) (*nfctest.Disk, error)) (*nfctest.Disk, error) {
		return open(strings.Replace(file, "web01.vmdk", "web01_1.vmdk", 1))
	}))
	r := v.exits(0, v.startCommand(nil, nil, "copy", "vm:web01#1", "x.raw", "--report", "r.json"))
	v.says(r, "the host has a disk with the UUID")
	if report := v.reportOf("r.json"); len(report.Warnings) != 1 {
		t.Errorf("%+v", report)
	}
	r = v.exits(0, v.startCommand(nil, nil, "copy", "vm:web01#2", "y.raw"))
	if strings.Contains(r.stderr, "UUID") {
		t.Errorf("the right disk was not recognised: %s", r.stderr)
	}
}

// TestVMViaNFCChanges copies a disk without a snapshot, by the name of its file, of a VM that is
// powered on and off again in the middle of the copy.
func TestVMViaNFCChanges(t *testing.T) {
	vmStates(t)
	for _, lost := range []bool{true, false} {
		t.Run(fmt.Sprintf("lost=%t", lost), func(t *testing.T) {
			v := newNFC(t)
			v.server.PowerOff("web01")
			p := v.startCommand([]string{"checkpoint:4"}, nil, "copy", v.server.Files("web01")[0], "off.raw", "--vm", v.moref(),
				"--request-size", "64KiB", "--depth", "1", "--rate-limit", "1MiB")
			release := p.at("checkpoint:4")
			v.server.PowerOn("web01")
			v.server.Write("web01", 1, []byte("new"), vmDiskSize-4096)
			v.server.PowerOff("web01")
			if lost {
				v.server.NFC("").Cut()
			}
			release()
			v.says(v.exits(1, p), "the VM was changed meanwhile, and no snapshot keeps the content of the disk")
			if _, err := os.Lstat(v.path("off.raw")); err == nil {
				t.Error("a mixture of two states has got the name of the copy")
			}
		})
	}
}
