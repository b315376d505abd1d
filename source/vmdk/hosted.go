package vmdk

import "fmt"

// emptySlack is the number of bytes that the file of an empty disk may have in addition to its
// metadata and one grain directory. These additional bytes are markers, a footer, and zeros that
// a transfer of the file added.
const emptySlack = footerSearch

// The type hosted is the index of a hosted sparse extent, which may be of the kind
// streamOptimized ("Virtual Disk Format 5.0", Hosted Sparse Extents). Such an extent may have a
// redundant grain directory, with a second set of grain tables.
type hosted struct {
	tables
	metadataEnd int64 // offset where the metadata ends (overHead), bytes; 0: not known
	compressed  bool  // grains are compressed, and the tables lie between them
}

// newHosted is the sparseReader for files that begin with the header of a hosted sparse
// extent.
func newHosted(f *grainFile, extentSize int64) (*sparse, error) {
	// The variable h is the header that has the offset of the grain directory, which may be
	// the footer. The variable first is the header at the start of the file. Only first has
	// the offset of the descriptor.
	h, footer, err := findHeader(f.file)
	if err != nil {
		return nil, err
	}
	first, err := readHeader(f.file)
	if err != nil {
		return nil, err
	}
	if err := h.check(f.fileSize); err != nil {
		return nil, err
	}
	g, err := newGeometry(h.capacity, h.grain, extentSize)
	if err != nil {
		return nil, err
	}
	entries := &sectorEntries{grain: h.grain, zeroGrain: h.flags&flagZeroGrain != 0}
	x := &hosted{
		tables:      newTables(f, g, entries, sectorEntryShift, uint64(h.tableEntries)),
		metadataEnd: int64(h.overhead) * sectorSize,
		compressed:  h.compressed(),
	}
	x.fixed = first.regions(f.fileSize)
	if footer != 0 {
		x.fixed = append(x.fixed, region{"footer", footer, footer + headerSize})
	}
	x.metadata = append([]region{{"metadata (overHead)", 0, max(int64(h.overhead), 1) * sectorSize}}, x.fixed...)
	s := &sparse{grainFile: f, geometry: g, index: x, compressed: h.compressed(), marked: h.marked()}
	if h.flags&flagRedundant != 0 && h.redundantOffset != 0 {
		// If the redundant directory is damaged, locate returns an error. This error is
		// ignored, because the redundant directory is needed only if the primary directory is
		// damaged too.
		x.redundant, _ = x.locate(&h, "redundant grain directory", h.redundantOffset)
	}
	if x.redundant.at == 0 && !h.hasDirectory() && h.marked() {
		if s.index, err = openMarkers(f, g, &h, footer, x.metadata); err != nil {
			return nil, fmt.Errorf("the file has no grain directory, and the grains cannot be found by their markers: %w", err)
		}
		return s, nil
	}
	return s, x.initDirectories(&h, entries)
}

// The method regions returns two ranges of the file: the range of the header at the start of
// the file, and the range of the descriptor. A grain directory or table cannot be in these
// ranges. The parameter fileSize is the size of the file in bytes.
func (h *header) regions(fileSize int64) []region {
	all := []region{{"header", 0, headerSize}}
	limit := uint64(fileSize) / sectorSize
	if h.descriptorSize > 0 && h.descriptorOffset > 0 && h.descriptorOffset <= limit && h.descriptorSize <= limit {
		all = append(all, region{"descriptor", int64(h.descriptorOffset) * sectorSize, int64(h.descriptorOffset+h.descriptorSize) * sectorSize})
	}
	return all
}

// The method locate returns the grain directory that, according to the header h, begins at the
// given sector. It returns an error if no grain directory can begin at this sector.
func (x *hosted) locate(h *header, what string, sector uint64) (directory, error) {
	at, err := h.directory(what, sector, x.fileSize)
	if err != nil {
		return directory{}, err
	}
	end := at + x.directorySize()
	if r, ok := within(x.fixed, at, end); ok {
		return directory{}, fmt.Errorf("the %s at sector %d, bytes %d to %d of the file, lies in the %s, bytes %d to %d: the header is damaged", what, sector, at, end, r.what, r.start, r.end)
	}
	return directory{what: what, at: at}, nil
}

// initDirectories finds the primary grain directory and reads both directories. The
// caller has set the redundant directory, if there is one.
func (x *hosted) initDirectories(h *header, entries *sectorEntries) error {
	primary, err := x.locate(h, "grain directory", h.directoryOffset)
	switch {
	case err == nil:
	case x.redundant.at == 0:
		return err
	default:
		x.warn("all grain tables are read through the redundant grain directory at offset %d, because the primary grain directory cannot be used: %w", x.redundant.at, err)
		primary, x.redundant = x.redundant, directory{}
	}
	x.primary = primary
	size := x.directorySize()
	own := region{primary.what, primary.at, primary.at + size}
	x.fixed, x.metadata = append(x.fixed, own), append(x.metadata, own)
	if r := x.redundant.at; r == primary.at {
		x.redundant = directory{} // the header names one directory twice
	} else if r != 0 {
		other := region{x.redundant.what, r, r + size}
		if err := disjoint([]region{own, other}); err != nil {
			return err
		}
		x.fixed, x.metadata = append(x.fixed, other), append(x.metadata, other)
	}
	if !x.checkable() {
		x.redundant = directory{}
		return nil
	}
	if !x.compressed {
		x.overlaps = newOverlapCheck(entries, x.count)
	}
	return x.indexDirectories()
}

// indexDirectories reads the grain directories once, when the extent is opened. It records where
// all grain tables are, because no grain can be at these places. It also finds the grain tables
// that overlap, and those that must be read through the redundant directory. Other damage is
// reported when a read reaches it.
func (x *hosted) indexDirectories() error {
	known, behind, first := 0, 0, int64(0)
	err := x.indexDirectory(&x.primary, func(start, end int64) {
		known++
		if end > x.metadataEnd {
			if behind++; behind == 1 {
				first = start
			}
		}
	})
	if err != nil {
		return err
	}
	if behind > 0 && x.metadataEnd > 0 && !x.compressed {
		// Some grain tables lie after the end of the metadata. Perhaps the writer of the
		// image has put them there. Perhaps an entry of the directory is damaged and points
		// to zeros in a grain. The two cases look alike. This is therefore a warning and
		// not an error.
		x.warn("the grain directory may be damaged: %d of %d grain tables lie after the end of the metadata (overHead) at offset %d; the first of these tables is at offset %d; check that the disk does not have zeros where it should have data", behind, x.count, x.metadataEnd, first)
	}
	if x.redundant.at != 0 {
		if err := x.indexDirectory(&x.redundant, func(int64, int64) {}); err != nil {
			return err
		}
	} else if size := x.directorySize(); known == 0 {
		if extra := x.fileSize - max(x.metadataEnd, x.primary.at+size) - size; extra > emptySlack {
			x.warn("the grain directory at offset %d may be damaged: it has no grain table, but the file has %d more bytes than an empty disk needs; check whether the disk should have data", x.primary.at, extra)
		}
	}
	x.replaceLoose()
	if x.redundant.at != 0 {
		x.compareDirectories()
	}
	return nil
}

// compareDirectories looks for grain tables that can be read only through the redundant
// directory, because their entries in the primary directory are 0 or damaged. If there are such
// tables, it adds a warning and sets x.fallback. When x.fallback is set, later reads find these
// tables through the redundant directory.
func (x *hosted) compareDirectories() {
	n := int64(0)
	var first error
	x.eachTable(func(i int64, read func(*directory) (int64, error)) {
		at, err := read(&x.primary)
		if why := x.replaced[i]; why != nil {
			at, err = noTable, why
		}
		if err == nil && at != noTable {
			return
		}
		redundant, damaged := read(&x.redundant)
		if damaged != nil || redundant == noTable && err == nil {
			return
		}
		if n++; n > 1 {
			return
		}
		if first = err; err == nil {
			first = fmt.Errorf("the grain directory's entry at offset %d, of grain table %d, is 0, but the redundant grain directory has this table", x.primary.at+i<<x.shift, i)
		}
	})
	if n > 0 {
		x.fallback = true
		x.warn("the grain directory is damaged: %d of %d grain tables are read through the redundant grain directory; the first of them: %w", n, x.count, first)
	}
}
