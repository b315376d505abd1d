package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/transfer/batch"
)

// manyJobs returns a job file with n jobs, for local files in dir or for disks of a
// host.
func manyJobs(n int, remote bool) []byte {
	var b bytes.Buffer
	b.WriteString(`{"version":1,"limits":{"total":60},"defaults":{"verify":true,"depth":8`)
	if remote {
		b.WriteString(`,"server":"vc.example.com","user":"backup","password":"+pw","thumbprint":"ab","retry_timeout":"1h"`)
	}
	b.WriteString(`},"jobs":[`)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		source := "disk"
		if remote {
			source = fmt.Sprintf("[ds1] vm%04d/vm%04[1]d.vmdk", i)
		}
		fmt.Fprintf(&b, `{"name":"vm%04d","source":"%s","target":"images/vm%04[1]d-0.qcow2","compress":"zstd:3","cluster_size":"64KiB"`, i, source)
		if remote {
			fmt.Fprintf(&b, `,"vm":"moref=vm-%d","snapshot":"snapshot-%[1]d","host":"esxi%d"`, i, i%100)
		}
		b.WriteString("}\n")
	}
	b.WriteString("]}")
	return b.Bytes()
}

// jobSpec returns a jobParser and its Spec.
func jobSpec(t *testing.T) (*jobParser, *batch.Spec) {
	t.Helper()
	parser, err := newJobParser(new(servers))
	if err != nil {
		t.Fatal(err)
	}
	spec, err := parser.spec()
	if err != nil {
		t.Fatal(err)
	}
	return parser, spec
}

// TestJobOfVM checks that the source vm:NAME#N of a job stays as it is and is not made an
// absolute path.
func TestJobOfVM(t *testing.T) {
	_, spec := jobSpec(t)
	text := `{"version":1,"defaults":{"server":"vc","user":"u"},"jobs":[{"source":"vm:web01#1","target":"a.raw"}]}`
	dir := t.TempDir()
	f, err := batch.Load(strings.NewReader(text), "jobs.json", dir, spec)
	if err != nil {
		t.Fatal(err)
	}
	if j := f.Jobs[0]; j.Source != "vm:web01#1" || j.Target != dir+"/a.raw" {
		t.Errorf("source %q, target %q", j.Source, j.Target)
	}
}

// TestJobSecrets checks that jobs get the secrets of the environment, also for disks of VMs.
func TestJobSecrets(t *testing.T) {
	parser, err := newJobParser(new(servers))
	if err != nil {
		t.Fatal(err)
	}
	parser.environment.password = secret.New("e")
	for _, source := range []string{"[ds] web01/web01.vmdk", "vm:web01#1"} {
		c, err := parser.command(&batch.Job{Source: source, Target: "/a.raw"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.resolve(); err != nil {
			t.Fatal(err)
		}
		if password, _ := c.login.expected(); password.Reveal() != "e" || c.servers == nil {
			t.Errorf("%s: the job has not got the password of the environment", source)
		}
	}
}

// Loading is parsing and checking a job, its flags and its files.
func BenchmarkLoadJobs(b *testing.B) {
	const jobs = 20_000
	dir := b.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "images"), 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "disk"), nil, 0o644); err != nil {
		b.Fatal(err)
	}
	parser, err := newJobParser(new(servers))
	if err != nil {
		b.Fatal(err)
	}
	for name, remote := range map[string]bool{"local": false, "remote": true} {
		text := manyJobs(jobs, remote)
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				spec, err := parser.spec()
				if err != nil {
					b.Fatal(err)
				}
				f, err := batch.Load(bytes.NewReader(text), "jobs.json", dir, spec)
				if err != nil || len(f.Jobs) != jobs {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/jobs, "ns/job")
		})
	}
}

// loadAllocations returns how many times loading text allocates, and how many
// bytes the result takes.
func loadAllocations(t *testing.T, text []byte) (count uint64, size int64) {
	t.Helper()
	_, spec := jobSpec(t)
	dir := t.TempDir()
	var before, after, kept runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	f, err := batch.Load(bytes.NewReader(text), "jobs.json", dir, spec)
	if err != nil {
		t.Fatal(err)
	}
	runtime.ReadMemStats(&after)
	runtime.GC()
	runtime.ReadMemStats(&kept)
	runtime.KeepAlive(f)
	return after.Mallocs - before.Mallocs, int64(kept.HeapAlloc) - int64(before.HeapAlloc)
}

// A batch may have a million jobs. A pass of the command line's parser for each
// took more than a thousand allocations, and 0.5 ms.
func TestLoadingIsCheap(t *testing.T) {
	const jobs = 1000
	for name, remote := range map[string]bool{"local": false, "remote": true} {
		count, size := loadAllocations(t, manyJobs(jobs, remote))
		if count > 300*jobs || size > 4<<10*jobs {
			t.Errorf("%s: %d allocations of %d bytes a job", name, count/jobs, size/jobs)
		}
	}
}

// TestLoadingSharesLabels checks that jobs share the labels of the defaults, without
// copies.
func TestLoadingSharesLabels(t *testing.T) {
	const jobs, labels = 2000, 2000
	var b strings.Builder
	b.WriteString(`{"version":1,"defaults":{"labels":{"l":"x"`)
	for i := range labels {
		fmt.Fprintf(&b, `,"l%d":"x"`, i)
	}
	b.WriteString(`}},"jobs":[{"source":"a","target":"b"}`)
	for i := range jobs {
		fmt.Fprintf(&b, `,{"source":"f","target":"t%d","labels":{"own":"%d"}}`, i, i)
	}
	b.WriteString("]}")
	if _, size := loadAllocations(t, []byte(b.String())); size > 20<<20 {
		t.Errorf("%d bytes for %d jobs and %d labels", size, jobs, labels)
	}
}

// TestSignalWhileLoading checks that a signal ends the wait for a job file from a pipe.
func TestSignalWhileLoading(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "jobs.json")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t, "run", fifo)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	writer, err := os.OpenFile(fifo, os.O_WRONLY, 0) // waits until it is read
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	if r := ended(t, cmd, cmd.Wait(), &stderr); r.exit != 130 {
		t.Errorf("exit status %d: %s", r.exit, r.stderr)
	}
}
