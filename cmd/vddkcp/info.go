package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
)

type infoCommand struct {
	Src  string `arg:"" name:"SRC" help:"The disk: the path of a VMDK, qcow2 or raw file or of a block device, an appliance (x.ova) or a disk of it (x.ova#1), an NBD URI, a disk on a VMware host ([DATASTORE] DIR/DISK.vmdk), or vddk:PATH."`
	JSON bool   `name:"json" help:"Print JSON."`
	sourceFlags
}

// imageInfo is what vddkcp info prints, as text or as JSON. docs/cli.md describes it.
type imageInfo struct {
	Source      string        `json:"source"`
	Format      string        `json:"format"`
	Subformat   string        `json:"subformat,omitempty"`
	VirtualSize int64         `json:"virtual_size"`
	SectorSize  int64         `json:"sector_size"`
	Physical    int64         `json:"physical_sector_size,omitempty"`
	Allocated   int64         `json:"allocated"`
	ClusterSize int64         `json:"cluster_size"`
	Backing     *string       `json:"backing"`
	Identity    *diskIdentity `json:"identity"`
	readFacts

	CID          string        `json:"cid,omitempty"`
	AdapterType  string        `json:"adapter_type,omitempty"`
	HWVersion    string        `json:"hardware_version,omitempty"`
	ToolsVersion string        `json:"tools_version,omitempty"`
	UUID         string        `json:"uuid,omitempty"`
	Geometry     *diskGeometry `json:"geometry,omitempty"`
	Chain        []string      `json:"chain,omitempty"`
	Extents      []imageExtent `json:"extents,omitempty"`

	Disks []applianceDisk `json:"disks,omitempty"` // only for an appliance
}

// readFacts say how a disk is read that is not a local image.
type readFacts struct {
	VDDK *vddkFacts `json:"vddk,omitempty"` // only for a disk that VDDK opened
	Ways []wayFacts `json:"ways,omitempty"` // only for a disk on a server
}

// vddkFacts describe the library and the connection through which a disk was read.
type vddkFacts struct {
	Library   string `json:"library"` // path of the library
	Version   string `json:"version"`
	Transport string `json:"transport"` // the transport mode that the library chose
	Server    string `json:"server,omitempty"`
	VM        string `json:"vm,omitempty"`
	Snapshot  string `json:"snapshot,omitempty"`
}

type diskIdentity struct {
	ID    string `json:"id"`
	Proof string `json:"proof"`
}

type diskGeometry struct {
	Cylinders int64 `json:"cylinders"`
	Heads     int64 `json:"heads"`
	Sectors   int64 `json:"sectors"`
}

type imageExtent struct {
	Kind   string  `json:"kind"`
	Size   int64   `json:"size"`
	Path   *string `json:"path"`
	Offset int64   `json:"offset"`
}

// applianceDisk is what vddkcp info prints about one disk of an appliance (.ova or .ovf).
type applianceDisk struct {
	Number   int    `json:"number"`
	Name     string `json:"name"`
	File     string `json:"file"`
	System   string `json:"system,omitempty"`
	Format   string `json:"format,omitempty"`
	Capacity int64  `json:"capacity"`
	Size     int64  `json:"size"`
	Error    string `json:"error,omitempty"` // why the disk cannot be read
}

func (c *infoCommand) Run(ctx context.Context, logs *logFlags) error {
	a, err := address.Parse(c.Src, address.Disk)
	if err != nil {
		return err
	}
	if err := c.choose(reads{}, a); err != nil {
		return err
	}
	var disks []sourceopen.DiskEntry
	if c.SourceFormat == "" {
		if disks, err = c.opener().Appliance(ctx, a); err != nil {
			return fmt.Errorf("info: %w", err)
		}
	}
	var info *imageInfo
	if vm, ok := a.(address.VM); ok {
		if info, err = c.describeVM(ctx, vm, logs); err != nil {
			return fmt.Errorf("info %s: %w", c.Src, err)
		}
	} else if appliance, ok := a.(address.Appliance); ok && len(disks) > 1 && appliance.IsWhole() {
		info = describeAppliance(c.Src, disks)
	} else {
		src, done, err := c.open(ctx, a, logs)
		if err != nil {
			return err
		}
		defer done()
		if info, err = describeImage(ctx, c.Src, src); err != nil {
			return fmt.Errorf("info %s: %w", c.Src, err)
		}
	}
	if c.chosen.reason != "" {
		info.Ways = c.ways(a)
	}
	info.addDisks(disks)
	out := standardOutput(ctx)
	if c.JSON {
		err = printJSON(out, info)
	} else {
		err = info.printText(out)
	}
	if err != nil {
		return fmt.Errorf("info %s: %w", c.Src, err)
	}
	return nil
}

// describeAppliance describes an appliance as a whole. The sizes in its result are the sums
// over all disks of the appliance.
func describeAppliance(address string, disks []sourceopen.DiskEntry) *imageInfo {
	i := &imageInfo{Source: address, Format: strings.ToLower(filepath.Ext(address)[1:])}
	for _, d := range disks {
		i.VirtualSize += d.Capacity
		i.Allocated += d.Size
	}
	return i
}

func (i *imageInfo) addDisks(disks []sourceopen.DiskEntry) {
	for _, d := range disks {
		a := applianceDisk{Number: d.Number, Name: d.Name, File: d.File, System: d.System, Format: d.Format, Capacity: d.Capacity, Size: d.Size}
		if d.Err != nil {
			a.Error = d.Err.Error()
		}
		i.Disks = append(i.Disks, a)
	}
}

// describeImage collects everything that is known of the opened disk d. The parameter
// address is the address of this disk.
func describeImage(ctx context.Context, address string, d source.Disk) (*imageInfo, error) {
	i := &imageInfo{Source: address, VirtualSize: d.Size()}
	if identified, ok := source.Ability[source.Identified](d); ok {
		id, proof, err := identified.Identity(ctx)
		if err != nil {
			return nil, err
		}
		i.Identity = &diskIdentity{id, proof}
	}
	if through, ok := source.Ability[sourceopen.ThroughVDDK](d); ok {
		library, params := through.Library(), through.Params()
		i.VDDK = &vddkFacts{
			Library: library.Path, Version: strconv.Itoa(library.Version),
			Server: params.Server, VM: params.VM, Snapshot: params.Snapshot,
		}
		if counted, ok := source.Ability[source.Counted](d); ok {
			stats := counted.Stats()
			i.VDDK.Transport, i.VDDK.Version = stats.Transport, stats.Library
		}
	}
	described, ok := source.Ability[source.Described](d)
	if !ok {
		return i, nil
	}
	info := described.Info()
	i.Format, i.Subformat = info.Format, info.Subformat
	i.SectorSize, i.Allocated, i.ClusterSize = info.LogicalSector, info.Allocated, info.ClusterSize
	i.Physical = info.GuestPhysical
	i.CID, i.AdapterType, i.UUID = info.CID, info.AdapterType, info.UUID
	i.HWVersion, i.ToolsVersion = info.HWVersion, info.ToolsVersion
	if g := info.Geometry; g != [3]int64{} {
		i.Geometry = &diskGeometry{g[0], g[1], g[2]}
	}
	if info.Format == "nfc" {
		i.Allocated = unknownSize
	}
	if i.VDDK != nil {
		// If a disk was opened with VDDK, its method Info does not tell how many bytes of
		// it are allocated. This number is computed here from the extents. Ranges whose
		// allocation VDDK cannot report count as allocated.
		for e, err := range d.Extents(ctx, 0, d.Size()) {
			if err != nil {
				return nil, err
			}
			if e.Kind == source.Data {
				i.Allocated += e.Len
			}
		}
	}
	if i.Chain = info.Chain; len(i.Chain) > 1 {
		i.Backing = &i.Chain[1]
	}
	for _, p := range info.Parts {
		e := imageExtent{Kind: p.Kind, Size: p.Size, Offset: p.Offset}
		if p.Path != "" {
			e.Path = &p.Path
		}
		i.Extents = append(i.Extents, e)
	}
	return i, nil
}

// printText prints each fact on a line, for people.
func (i *imageInfo) printText(out io.Writer) error {
	w := bufio.NewWriter(out)
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-17s %s\n", key, value)
		}
	}
	text := func(key, value string) { line(key, printable.Name(value)) }
	text("source:", i.Source)
	text("format:", i.Format)
	text("subformat:", i.Subformat)
	line("virtual size:", bothSizes(i.VirtualSize))
	if i.Allocated != unknownSize {
		line("allocated:", bothSizes(i.Allocated))
	}
	if i.SectorSize > 0 {
		line("sector size:", bothSizes(i.SectorSize))
	}
	if i.Physical > 0 && i.Physical != i.SectorSize {
		line("physical sectors:", bothSizes(i.Physical))
	}
	if i.ClusterSize > 0 {
		line("cluster size:", bothSizes(i.ClusterSize))
	}
	text("CID:", i.CID)
	text("UUID:", i.UUID)
	text("adapter type:", i.AdapterType)
	text("hardware version:", i.HWVersion)
	text("tools version:", i.ToolsVersion)
	if g := i.Geometry; g != nil {
		line("geometry:", fmt.Sprintf("%d cylinders, %d heads, %d sectors", g.Cylinders, g.Heads, g.Sectors))
	}
	if i.Identity != nil {
		line("identity:", fmt.Sprintf("%s (proof: %s)", printable.Name(i.Identity.ID), i.Identity.Proof))
	}
	if v := i.VDDK; v != nil {
		text("VDDK:", fmt.Sprintf("version %s, %s", v.Version, v.Library))
		text("transport:", v.Transport)
		text("server:", v.Server)
		text("VM:", v.VM)
		text("snapshot:", v.Snapshot)
	}
	for _, w := range i.Ways {
		line("via "+w.Via+":", w.String())
	}
	if i.Backing != nil {
		text("backing:", *i.Backing)
		for n, path := range i.Chain {
			text([]string{"chain:", ""}[min(n, 1)], path)
		}
	}
	for n, e := range i.Extents {
		line([]string{"extents:", ""}[min(n, 1)], e.String())
	}
	for n, d := range i.Disks {
		line([]string{"disks:", ""}[min(n, 1)], d.String())
	}
	return w.Flush()
}

func (d *applianceDisk) String() string {
	capacity := "capacity unknown"
	if d.Capacity > 0 {
		capacity = bothSizes(d.Capacity)
	}
	s := fmt.Sprintf("#%d %s, %s", d.Number, printable.Name(d.Name), capacity)
	if d.System != "" {
		s += " of " + printable.Name(d.System)
	}
	if d.File != "" {
		s += ", in " + printable.Name(d.File)
	}
	if d.File != "" && d.Size != unknownSize {
		s += fmt.Sprintf(" (%s)", bytesize.Format(d.Size))
	}
	if d.Error != "" {
		s += ": " + printable.Line(d.Error)
	}
	return s
}

func (e *imageExtent) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s %s", printable.Name(e.Kind), bothSizes(e.Size))
	if e.Path != nil {
		s.WriteString(" " + printable.Name(*e.Path))
	}
	if e.Offset > 0 {
		fmt.Fprintf(&s, ", from byte %d on", e.Offset)
	}
	return s.String()
}

// bothSizes returns a text with n bytes in a unit that is easy to read, such as GiB,
// followed by the exact number of bytes.
func bothSizes(n int64) string {
	if n < 1<<10 {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%s (%d bytes)", bytesize.Format(n), n)
}
