package open

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/ova"
	"github.com/vddkcp/vddkcp/source/raw"
)

// Manifest is the ability of a disk of an appliance to be held against the
// appliance's manifest. VerifyManifest reads the descriptor and the files of
// the disk from their start to their end. A difference is a *ManifestError; a
// file that the manifest does not have, or no manifest, an ErrNoManifest.
type Manifest interface {
	VerifyManifest(ctx context.Context) error
}

// Warned is the ability of a disk to tell of what is odd and no error: an
// appliance's descriptor that says other sizes than the disk has, an image that
// was not closed cleanly. The warnings name the file.
type Warned interface{ Warnings() []string }

// ManifestError is a file that is not what the manifest of its appliance says.
type ManifestError = ova.ManifestError

// ErrNoManifest says that an appliance has no manifest, or not of this file.
var ErrNoManifest = ova.ErrNoManifest

// DiskEntry is a disk of an appliance, as the descriptor has it.
type DiskEntry struct {
	Number   int    // from 1 on; #NUMBER after the address picks it
	Name     string // diskId; #NAME picks it too
	File     string // relative to the descriptor, "" of an empty disk
	System   string // the id of the virtual system that uses it, "" where not told
	Format   string // "vmdk", "raw", "qcow2", "vhd", "vdi"; "": by its content
	Capacity int64  // bytes, 0 where not told
	Size     int64  // of the file, bytes
	Err      error  // why the disk can't be opened, as far as is known
}

func (e *DiskEntry) String() string {
	capacity := "capacity unknown"
	if e.Capacity > 0 {
		capacity = bytesize.Format(e.Capacity)
	}
	s := fmt.Sprintf("#%d %s (%s", e.Number, printable.Name(e.Name), capacity)
	if e.System != "" {
		s += " of " + printable.Name(e.System)
	}
	return s + ")"
}

// ChoiceError is an address that does not say which disk of an appliance is
// meant, or names one that the appliance lacks.
type ChoiceError struct {
	Path   string
	Choice string // what is after #, "" without
	Disks  []DiskEntry
}

// maxListed bounds the disks that an error lists.
const maxListed = 32

func (e *ChoiceError) Error() string {
	var list []string
	for i := range e.Disks[:min(len(e.Disks), maxListed)] {
		list = append(list, e.Disks[i].String())
	}
	if more := len(e.Disks) - len(list); more > 0 {
		list = append(list, fmt.Sprintf("and %d more", more))
	}
	all := strings.Join(list, ", ")
	switch {
	case e.Choice == "":
		return fmt.Sprintf("%s has %d disks: %s", e.Path, len(e.Disks), all)
	case e.matches() > 1:
		return fmt.Sprintf("%s has %d disks by the name %s: %s", e.Path, e.matches(), printable.Name(e.Choice), all)
	}
	return fmt.Sprintf("%s has no disk %s; it has %s", e.Path, printable.Name(e.Choice), all)
}

func (e *ChoiceError) matches() int {
	n := 0
	for _, d := range e.Disks {
		if d.is(e.Choice) {
			n++
		}
	}
	return n
}

// Hint is what the user can do.
func (e *ChoiceError) Hint() string {
	return fmt.Sprintf("name one, by its number or its name: '%s#%d'", e.Path, e.Disks[0].Number)
}

// ExitStatus implements the interface of transfer/report.
func (*ChoiceError) ExitStatus() int { return exit.Usage }

// is reports whether name names the disk.
func (e *DiskEntry) is(name string) bool { return name != "" && (e.Name == name || e.File == name) }

// FileOf returns the path of the local file that a source names: for a disk of an
// appliance, the appliance. It returns ok false if the source is no local file.
func FileOf(a address.Address) (path string, ok bool) {
	switch a := a.(type) {
	case address.Path:
		return string(a), true
	case address.Appliance:
		if _, err := os.Lstat(a.String()); err != nil {
			return a.Path, true
		}
		return a.String(), true
	}
	return "", false
}

// Appliance lists all disks of the appliance that an address names, whichever of
// them it picks. It returns nil if the address is not one of an appliance. A disk
// whose file is missing or not read is listed, with its error.
func (o *Opener) Appliance(ctx context.Context, a address.Address) ([]DiskEntry, error) {
	at, ok := a.(address.Appliance)
	if !ok {
		return nil, nil
	}
	path := at.Path
	// What is only looked at is not listed as opened.
	appliance, _, err := (&Opener{AllowPath: o.AllowPath}).appliance(ctx, path)
	if err != nil {
		return nil, err
	}
	defer appliance.Close()
	disks := entries(appliance)
	for i := range disks {
		disks[i].Size, disks[i].Err = appliance.Size(ctx, i)
		if disks[i].Err == nil && !isRead(disks[i].Format) {
			disks[i].Err = notRead(path, &disks[i])
		}
	}
	return disks, nil
}

// appliance opens an .ova or .ovf file. Beside is the Opener of the files
// beside an .ovf, nil for an .ova.
func (o *Opener) appliance(ctx context.Context, path string) (a *ova.Appliance, beside source.Opener, err error) {
	f, err := o.openFile(ctx, path)
	if err != nil {
		return nil, nil, err
	}
	if f.Size() == 0 {
		f.Close()
		return nil, nil, &emptyError{path: path}
	}
	if strings.EqualFold(filepath.Ext(path), ".ova") {
		a, err = ova.Open(ctx, path, f)
		return a, nil, err
	}
	beside, err = o.references(f, path, nil)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	a, err = ova.OpenDescriptor(path, f, beside)
	return a, beside, err
}

func entries(a *ova.Appliance) []DiskEntry {
	disks := make([]DiskEntry, len(a.Disks))
	for i := range a.Disks {
		d := &a.Disks[i]
		disks[i] = DiskEntry{
			Number: d.Number, Name: d.Name(), File: d.File, System: d.System,
			Format: formatOf(d.Format), Capacity: d.Capacity,
		}
	}
	return disks
}

// formatOf returns the format that the URI of a descriptor means, "" where it
// is none that is known. The URIs differ by writer and by year.
func formatOf(uri string) string {
	uri = strings.ToLower(uri)
	for _, f := range []struct{ part, format string }{
		{"vmdk", "vmdk"},
		{"qcow", "qcow2"},
		{"wiki/byte", "raw"}, // oVirt
		{"vhd", "vhd"},
		{"bb676673", "vhd"},      // Microsoft
		{"linkid=137171", "vhd"}, // VirtualBox
		{"vdi", "vdi"},
	} {
		if strings.Contains(uri, f.part) {
			return f.format
		}
	}
	return ""
}

func isRead(format string) bool { return format != "vhd" && format != "vdi" }

func notRead(path string, e *DiskEntry) error {
	return fmt.Errorf("%s: disk %s is a %s image: %w", path, printable.Name(e.Name), strings.ToUpper(e.Format), ErrNotRead)
}

// pick returns the index of the disk that is meant.
func pick(path, choice string, disks []DiskEntry) (int, error) {
	if choice == "" {
		if len(disks) == 1 {
			return 0, nil
		}
		return 0, &ChoiceError{path, choice, disks}
	}
	if n, err := strconv.Atoi(choice); err == nil && n >= 1 && n <= len(disks) {
		return n - 1, nil
	}
	found := -1
	for i := range disks {
		if disks[i].is(choice) {
			if found >= 0 {
				return 0, &ChoiceError{path, choice, disks}
			}
			found = i
		}
	}
	if found < 0 {
		return 0, &ChoiceError{path, choice, disks}
	}
	return found, nil
}

// openAppliance opens the disk of an appliance at the address at.
func (o *Opener) openAppliance(ctx context.Context, at address.Appliance) (source.Disk, error) {
	a, beside, err := o.appliance(ctx, at.Path)
	if err != nil {
		return nil, err
	}
	d, err := o.openApplianceDisk(ctx, a, beside, at.Path, at.Choice)
	if err != nil {
		a.Close()
		return nil, err
	}
	return d, nil
}

func (o *Opener) openApplianceDisk(ctx context.Context, a *ova.Appliance, beside source.Opener, path, choice string) (source.Disk, error) {
	disks := entries(a)
	i, err := pick(path, choice, disks)
	if err != nil {
		return nil, err
	}
	e := &disks[i]
	if !isRead(e.Format) {
		return nil, notRead(path, e)
	}
	f, err := a.OpenDisk(ctx, i)
	if err != nil {
		return nil, err
	}
	d := &applianceDisk{Disk: f, appliance: a}
	if e.File == "" {
		return d, nil
	}
	size := f.Size()
	shown := pathOf(f, e.File)
	if size == 0 {
		f.Close()
		return nil, fmt.Errorf("%s: the file is empty (0 bytes), want a disk image", shown)
	}
	d.Disk, err = o.openImage(ctx, f, shown, e.Format, func() (source.Opener, error) {
		switch file, ok := f.(*raw.Disk); {
		case beside == nil:
			return o.inArchive(a, shown, e.File, nil)
		case ok:
			return d.namedBeside(o, file, shown, e.File)
		}
		return func(_ context.Context, from, name, _ string) (source.Disk, error) {
			return nil, fmt.Errorf("%s names %q: an image in chunks is read where it is all of a disk", from, name)
		}, nil
	})
	if err != nil {
		return nil, err
	}
	if described, ok := source.Ability[source.Described](d.Disk); ok && described.Info().Format == "raw" {
		if err := a.CheckRaw(i, size); err != nil {
			return nil, errors.Join(err, d.Disk.Close())
		}
	}
	d.warnings = a.Warnings(i, size, d.Size())
	if w, ok := source.Ability[Warned](d.Disk); ok {
		d.warnings = append(d.warnings, w.Warnings()...)
	}
	return d, nil
}

// pathOf returns the path that f is shown by.
func pathOf(f source.Disk, name string) string {
	if d, ok := source.Ability[source.Described](f); ok && len(d.Info().Chain) > 0 {
		return d.Info().Chain[0]
	}
	return name
}

// inArchive returns the Opener for the files that the image called member names:
// other files of the archive, and nothing else. children are the images that led
// to this one. shown is how errors call the image.
func (o *Opener) inArchive(a *ova.Appliance, shown, member string, children chain) (source.Opener, error) {
	images, err := children.extend(shown, link{member: member})
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, from, name, format string) (source.Disk, error) {
		f, named, err := a.OpenFile(ctx, member, name)
		if errors.Is(err, os.ErrNotExist) {
			return nil, fmt.Errorf("%s names %q, and an image in an archive may name files of the archive only: %w", from, name, err)
		}
		if err != nil {
			return nil, err
		}
		path := pathOf(f, named)
		return o.openImage(ctx, f, path, format, func() (source.Opener, error) { return o.inArchive(a, path, named, images) })
	}, nil
}

// applianceDisk is a disk of an appliance, which it closes. It wraps the disk
// in the image, so that the abilities of that one are found.
type applianceDisk struct {
	source.Disk
	appliance *ova.Appliance
	warnings  []string
	// named are the files beside a descriptor that the image names, relative to
	// it, and unchecked is one that names others in its turn.
	named     []string
	unchecked string
}

// namedBeside returns the Opener for what the image in f names, whose name in
// the descriptor is file, and keeps the names for VerifyManifest.
func (d *applianceDisk) namedBeside(o *Opener, f *raw.Disk, shown, file string) (source.Opener, error) {
	opens, err := o.references(f, shown, nil)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, from, name, format string) (source.Disk, error) {
		x, err := opens(ctx, from, name, format)
		switch {
		case err != nil:
			return nil, err
		case format != "raw":
			d.unchecked = pathOf(x, name)
		case filepath.IsAbs(name):
			d.named = append(d.named, name)
		default:
			d.named = append(d.named, filepath.Join(filepath.Dir(file), name))
		}
		return x, nil
	}, nil
}

func (d *applianceDisk) Unwrap() source.Disk { return d.Disk }

func (d *applianceDisk) Close() error {
	return errors.Join(d.Disk.Close(), d.appliance.Close())
}

func (d *applianceDisk) Warnings() []string { return d.warnings }

func (d *applianceDisk) VerifyManifest(ctx context.Context) error {
	if err := d.appliance.Verify(ctx, d.named...); err != nil {
		return err
	}
	if d.unchecked != "" {
		return fmt.Errorf("%s: it is named by an image, not by the descriptor: %w", d.unchecked, ErrNoManifest)
	}
	return nil
}
