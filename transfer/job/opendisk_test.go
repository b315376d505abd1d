package job

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// identified is a disk with an identity.
type identified struct {
	*sourcetest.Memory
	id string
}

func (d *identified) Identity(context.Context) (id, proof string, err error) {
	return d.id, "snapshot", nil
}

// TestOpenDisk copies a disk that the caller opens. The text Spec.Source is no valid address.
func TestOpenDisk(t *testing.T) {
	const name = "nbd://host:port/[x"
	content := bytes.Repeat([]byte{9}, 1<<20)
	dst := filepath.Join(t.TempDir(), "copy.raw")
	opener := &sourceopen.Opener{VDDK: &sourceopen.VDDK{}}
	var log bytes.Buffer
	spec := Spec{
		Source: name, Target: dst, Opener: opener, Connections: 3, RequestSize: 64 << 10, Depth: 2, SingleLink: true,
		Log: slog.New(slog.NewTextHandler(&log, nil)),
		OpenDisk: func(_ context.Context, o *sourceopen.Opener) (source.Disk, error) {
			v := &o.VDDK.Options
			if o != opener || !o.SingleLink || o.NBD.Connections != 3 || v.Connections != 3 || v.RequestSize != 64<<10 || v.Depth != 2 || v.Log == nil || v.Warn == nil {
				t.Errorf("options %+v", o)
			}
			v.Warn("from the opener")
			return &sourcetest.Memory{Bytes: content}, nil
		},
	}
	r, err := Run(t.Context(), spec)
	if err != nil || r.Source != name || len(r.Warnings) != 1 || r.Warnings[0] != "from the opener" || !strings.Contains(log.String(), "from the opener") {
		t.Errorf("%v, report %+v, log %s", err, r, &log)
	}
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the copy differs: %v", err)
	}
	d, err := OpenSource(t.Context(), spec)
	if err != nil || d.Size() != 1<<20 {
		t.Errorf("OpenSource: %v", err)
	}
	boom := errors.New("boom")
	spec.Target, spec.OpenDisk = dst+"2", func(context.Context, *sourceopen.Opener) (source.Disk, error) { return nil, boom }
	if r, err = Run(t.Context(), spec); !errors.Is(err, boom) || !strings.Contains(r.Error, name) {
		t.Errorf("%v, report %+v", err, r)
	}
	if !spec.CanResume() || !spec.WritesFile() {
		t.Error("a copy of a disk that OpenDisk opens cannot be resumed")
	}
}

// TestOpenDiskIsRemote checks that a disk that the caller opens counts as one on a server, even if
// Spec.Source looks like another address.
func TestOpenDiskIsRemote(t *testing.T) {
	for _, name := range []string{"-", "disk.vmdk", "vm:web01#1"} {
		j := newJob(Spec{Source: name, Target: "copy.raw", OpenDisk: func(context.Context, *sourceopen.Opener) (source.Disk, error) { return nil, nil }})
		if err := j.Parse(); err != nil {
			t.Fatal(err)
		}
		if j.isStream() || j.patience() != 100*time.Millisecond || !j.lostServer(io.ErrUnexpectedEOF) || j.lostServer(source.Permanent(io.EOF)) || j.formatByName() != "" {
			t.Errorf("%q: stream %v, patience %v, format %q", name, j.isStream(), j.patience(), j.formatByName())
		}
		if j.dry = true; j.patience() != math.MaxInt64 {
			t.Errorf("%q: a dry run has the patience %v", name, j.patience())
		}
	}
}

// TestOpenDiskIdentity stops a copy of a disk that the caller opens. The journal has the identity
// of the disk, and only a disk with this identity continues the copy.
func TestOpenDiskIdentity(t *testing.T) {
	content := bytes.Repeat([]byte{9}, 1<<20)
	dst := filepath.Join(t.TempDir(), "copy.raw")
	signal := errors.New("signal")
	run := func(id string, stop bool) (*report.Report, error) {
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		return Run(ctx, Spec{
			Source: "vm:web01#1", Target: dst, Resume: true, RequestSize: 64 << 10, Depth: 1, Hold: true,
			OpenDisk: func(context.Context, *sourceopen.Opener) (source.Disk, error) {
				m := &sourcetest.Memory{Bytes: content}
				m.OnRead = func(off int64, _ int) error {
					if stop && off >= 512<<10 {
						cancel(signal)
					}
					return nil
				}
				return &identified{m, id}, nil
			},
		})
	}
	if r, err := run("vsphere:1", true); !errors.Is(err, signal) || r.Exit != exit.Resumable {
		t.Fatalf("%v, report %+v", err, r)
	}
	entries, err := journal.Load(journal.Beside(dst + ".partial"))
	if err != nil || len(entries) == 0 || entries[0].Source != "vsphere:1" || entries[0].Proof != "snapshot" || entries[0].Offset == 0 {
		t.Fatalf("journal %+v, %v", entries, err)
	}
	if r, err := run("vsphere:2", false); r.Exit != exit.Usage {
		t.Errorf("another disk: %v, report %+v", err, r)
	}
	r, err := run("vsphere:1", false)
	if err != nil || r.ResumedFrom != entries[0].Offset {
		t.Errorf("%v, report %+v", err, r)
	}
	if got, err := os.ReadFile(dst + ".partial"); err != nil || !bytes.Equal(got, content) {
		t.Errorf("the copy differs: %v", err)
	}
}

// TestHoldKeepsAMixture checks that a held copy keeps the target and the journal if the source
// changes.
func TestHoldKeepsAMixture(t *testing.T) {
	for _, hold := range []bool{false, true} {
		dst := filepath.Join(t.TempDir(), "copy.raw")
		partial := dst + ".partial"
		run := func(changed bool) (*report.Report, error) {
			m := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{9}, 1<<20)}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			m.OnRead = func(off int64, _ int) error {
				switch {
				case off < 512<<10:
				case changed:
					return source.Changed(errors.New("boom"))
				default:
					cancel()
				}
				return nil
			}
			return Run(ctx, Spec{
				Source: "vm:web01#1", Target: dst, Hold: hold, Resume: true, RequestSize: 64 << 10, Depth: 1,
				OpenDisk: func(context.Context, *sourceopen.Opener) (source.Disk, error) {
					return &identified{m, "vsphere:1"}, nil
				},
			})
		}
		if r, err := run(false); r.Exit != exit.Resumable {
			t.Fatalf("%v, report %+v", err, r)
		}
		r, err := run(true)
		if !errors.Is(err, source.ErrChanged) || r.Exit != exit.Failed {
			t.Errorf("hold %v: %v, report %+v", hold, err, r)
		}
		_, err = os.Lstat(partial)
		entries, loaded := journal.Load(journal.Beside(partial))
		if (err == nil) != hold || (len(entries) > 0) != hold || loaded != nil {
			t.Errorf("hold %v: the target: %v; the journal: %d entries, %v", hold, err, len(entries), loaded)
		}
	}
}
