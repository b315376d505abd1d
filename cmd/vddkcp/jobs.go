package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/profile"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

type jobsCommand struct {
	Pattern string `arg:"" optional:"" name:"PATTERN" help:"The VMs whose disks are to be copied, as for ls. Without PATTERN, these are all VMs."`
	Target  string `help:"Where the disks are copied to: the path of a folder, or a template for paths or NBD URIs with the placeholders {vm}, {n}, {key}, {label}, {folder} and {moref}." required:"" placeholder:"TEMPLATE"`
	serverFlags

	NFCHostPort portFlag `name:"nfchostport" help:"Port of the ESXi hosts for the disk data, for the job file (default 902)." placeholder:"PORT" group:"VDDK:"`
	Via         viaFlag  `help:"How to read the disks, for the job file: vddk, nfc or auto." enum:",auto,vddk,nfc" default:"" placeholder:"auto|vddk|nfc" group:"VDDK:"`
	LibDir      string   `name:"libdir" help:"The VDDK library, for the job file: the folder of the distribution, its folder lib64, or the file of the library itself." placeholder:"DIR" type:"path" group:"VDDK:"`
}

func (c *jobsCommand) Run(ctx context.Context, logs *logFlags) error {
	template, err := machine.ParseTarget(c.Target, "")
	if err != nil {
		return fmt.Errorf("jobs: --target: %w", err)
	}
	if c.Via == viaNFC && c.LibDir != "" {
		return usage.New("jobs: --libdir is only for VDDK, and the disks are to be read over NFC (--via nfc)", "leave out one of the two flags")
	}
	err = c.withSession(ctx, logs, func(ctx context.Context, s *vsphere.Session, log *slog.Logger) error {
		vms, err := listVMs(ctx, s, c.Pattern)
		if err != nil {
			return err
		}
		list, err := jobsOf(vms, c.Pattern, template)
		if list != nil {
			for _, message := range list.skipped {
				log.Warn(message)
			}
		}
		if err != nil {
			return err
		}
		r, err := c.resolve()
		if err != nil {
			return err
		}
		defaults := r.jobDefaults()
		defaults.LibDir, defaults.NFCHostPort, defaults.Via = c.LibDir, int(c.NFCHostPort), string(c.Via)
		if defaults.Password, err = c.Password.pathForJobs(); err != nil {
			return err
		}
		if err := printJSON(standardOutput(ctx), jobFile{1, defaults, list.jobs}); err != nil {
			return err
		}
		log.Info(list.summary(len(vms)))
		if !defaults.hasSecret(r.profile) {
			log.Info(`the job file has no password: set VDDKCP_PASSWORD for vddkcp run, or add "password": "+FILE" to its defaults`)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("jobs: %w", err)
	}
	return nil
}

// jobFile is a job file for vddkcp run, as vddkcp jobs prints it.
type jobFile struct {
	Version  int         `json:"version"`
	Defaults jobDefaults `json:"defaults"`
	Jobs     []diskJob   `json:"jobs"`
}

// jobDefaults are the fields of all jobs. They say how to reach the server and the library,
// without secrets.
type jobDefaults struct {
	Profile     string `json:"profile,omitempty"`
	Server      string `json:"server,omitempty"`
	Port        int    `json:"port,omitempty"`
	User        string `json:"user,omitempty"`
	Password    string `json:"password,omitempty"` // +FILE, never the password itself
	Thumbprint  string `json:"thumbprint,omitempty"`
	LibDir      string `json:"libdir,omitempty"`
	NFCHostPort int    `json:"nfchostport,omitempty"`
	Via         string `json:"via,omitempty"`
}

// The method jobDefaults returns the fields with which jobs reach the same server. If a profile is
// used, they have its name, and only those other values that the profile does not have.
func (r *settled) jobDefaults() jobDefaults {
	d := jobDefaults{Server: r.server, Port: int(r.port), User: r.user, Thumbprint: r.thumbprint}
	if r.profile == nil {
		if r.port == certificate.DefaultPort {
			d.Port = 0
		}
		return d
	}
	d.Profile, d.Server = r.profile.Name, ""
	if d.User == r.profile.User {
		d.User = ""
	}
	if d.Thumbprint == r.profile.Thumbprint {
		d.Thumbprint = ""
	}
	if r.port == r.profile.Port {
		d.Port = 0
	}
	return d
}

// The method hasSecret reports whether jobs with these fields get a password or a cookie from the
// given profile. The profile is nil if none is used.
func (d *jobDefaults) hasSecret(p *profile.Profile) bool {
	return d.Password != "" || p != nil && d.User == "" && (p.Password.IsSet() || p.Cookie.IsSet())
}

// diskJob is the job that copies one disk.
type diskJob struct {
	Name   string            `json:"name"`
	Source string            `json:"source"`
	Target string            `json:"target"`
	Host   string            `json:"host,omitempty"` // for the limits for each host
	Labels map[string]string `json:"labels"`
}

// jobList are the jobs for the disks of some VMs.
type jobList struct {
	jobs    []diskJob
	vms     int      // VMs that have a job
	size    int64    // of all disks that have a job, in bytes
	skipped []string // messages about VMs and disks without a job
	missing int      // disks without a job
}

// jobsOf returns a job for each disk that can be copied in the present power state of its VM. The
// jobs are in the order of the paths of the VMs, and then of the numbers of the disks.
//
// The parameter pattern is the pattern that has selected the VMs. The error is a *usage.Error if
// several disks would have the same target.
func jobsOf(vms []*inventory.VM, pattern string, template *machine.Template) (*jobList, error) {
	vms = slices.Clone(vms)
	slices.SortStableFunc(vms, func(a, b *inventory.VM) int {
		return strings.Compare(a.Path+"\x00"+a.Moref, b.Path+"\x00"+b.Moref)
	})
	named := map[string]int{} // number of VMs with a name
	for _, vm := range vms {
		named[vm.Name]++
	}
	list := &jobList{jobs: []diskJob{}}
	names := map[string]bool{}
	var targets []machine.Target
	for _, vm := range vms {
		before := len(list.jobs)
		if len(vm.Disks) == 0 {
			why := "the VM has no disks"
			if vm.Verdict == inventory.Never {
				why = "cannot be copied: " + vm.Reason
			}
			list.skipped = append(list.skipped, fmt.Sprintf("VM %s: %s", printable.Name(vm.Path), why))
		}
		for i := range vm.Disks {
			d := &vm.Disks[i]
			if !d.Verdict.CopyableIn(vm.Power) {
				list.missing++
				why := "cannot be copied"
				if d.Verdict == inventory.WhenOff {
					why = "can be copied only while the VM is off"
				}
				list.skipped = append(list.skipped, fmt.Sprintf("VM %s: %s %s: %s", printable.Name(vm.Path), d.Title(), why, d.Reason))
				continue
			}
			target, err := template.Target(vm, d)
			if err != nil {
				return nil, err
			}
			targets = append(targets, machine.Target{VM: vm, Disk: d, Address: target})
			unique := named[vm.Name] == 1 && !strings.ContainsAny(pattern, "/=")
			list.jobs = append(list.jobs, diskJob{
				Name: jobName(vm, d, names), Source: sourceOf(vm, d, unique), Target: target, Host: vm.Host,
				Labels: map[string]string{"vm": vm.Name, "folder": vm.Folder, "host": vm.Host, "datastore": d.Datastore, "power": string(vm.Power)},
			})
			list.size += d.Size
		}
		if len(list.jobs) > before {
			list.vms++
		}
	}
	if len(list.jobs) == 0 {
		return list, errors.New("no disk can be copied now")
	}
	return list, machine.CheckTargets(targets)
}

// The method summary says how many of the given number of VMs have jobs.
func (l *jobList) summary(vms int) string {
	text := fmt.Sprintf("%s for %d of %s, %s in all", plural(len(l.jobs), "job", "jobs"), l.vms, plural(vms, "VM", "VMs"), bytesize.Format(l.size))
	if l.missing > 0 {
		text += fmt.Sprintf("; %s no job", plural(l.missing, "disk has", "disks have"))
	}
	return text
}

// sourceOf returns the address of a disk. It has the name of the VM if no other VM of the server has
// this name, and if the name cannot be taken for a pattern, a path or another kind of address.
// Otherwise it has the managed object reference of the VM.
func sourceOf(vm *inventory.VM, d *inventory.Disk, unique bool) string {
	name := vm.Name
	if !unique || strings.ContainsAny(name, `*?[]{}\/%#=`) || name != printable.Name(name) || name != strings.TrimSpace(name) {
		name = "moref=" + vm.Moref
	}
	return address.VM{Name: name, Disk: fmt.Sprint(d.N)}.String()
}

// jobName returns a name for the job of a disk, VM-diskN, and adds it to the names in use. If the
// name is in use already, the name of the job has the managed object reference of the VM, too. A
// comma in the name of a VM becomes "_", because commas separate the names in --only.
func jobName(vm *inventory.VM, d *inventory.Disk, used map[string]bool) string {
	clean := strings.ReplaceAll(machine.CleanName(vm.Name), ",", "_")
	name := fmt.Sprintf("%s-disk%d", clean, d.N)
	if used[name] {
		name = fmt.Sprintf("%s-%s-disk%d", clean, vm.Moref, d.N)
	}
	for i := 2; used[name]; i++ {
		name = fmt.Sprintf("%s-%s-disk%d-%d", clean, vm.Moref, d.N, i)
	}
	used[name] = true
	return name
}
