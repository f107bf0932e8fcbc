/**
 * Makes QuPath's objects from arrays, in bulk: one call from Python instead of millions.
 *
 * Compiled by patchcl_qupath/project/jvm.py in QuPath's own JVM; not a script to run in QuPath.
 */

import groovy.transform.CompileStatic
import qupath.lib.measurements.MeasurementList
import qupath.lib.measurements.MeasurementListFactory
import qupath.lib.objects.PathObject
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
import qupath.lib.roi.interfaces.ROI

@CompileStatic
class Columns {

    /**
     * N polygons. x and y are the vertices of all, one polygon after the other; ends[k] is the index after the last
     * vertex of polygon k.
     */
    static List<ROI> toRois(double[] x, double[] y, int[] ends) {
        ImagePlane plane = ImagePlane.getDefaultPlane()
        List<ROI> rois = new ArrayList<>(ends.length)
        int start = 0
        for (int end : ends) {
            rois.add(ROIs.createPolygonROI(Arrays.copyOfRange(x, start, end), Arrays.copyOfRange(y, start, end), plane))
            start = end
        }
        return rois
    }

    /**
     * N polygons as annotations or detections, with what 'measure' and 'identify' give them; codes are the numbers of
     * their classes.
     */
    static List<PathObject> toObjects(List<ROI> rois, long[] ids, String[] names, float[] values,
                                      PathClass[] pathClasses, int[] codes, boolean annotations) {
        List<PathObject> objects = new ArrayList<>(rois.size())
        for (int k = 0; k < rois.size(); k++) {
            MeasurementList measured = measure(names, values, k)
            PathClass pathClass = pathClasses[codes[k]]
            objects.add(identify(annotations ?
                    PathObjects.createAnnotationObject(rois[k], pathClass, measured) :
                    PathObjects.createDetectionObject(rois[k], pathClass, measured), ids, k))
        }
        return objects
    }

    /** N polygons as cells, with a nucleus within each. */
    static List<PathObject> toCells(List<ROI> cells, List<ROI> nuclei, long[] ids, String[] names, float[] values,
                                    PathClass[] pathClasses, int[] codes) {
        List<PathObject> objects = new ArrayList<>(cells.size())
        for (int k = 0; k < cells.size(); k++)
            objects.add(identify(PathObjects.createCellObject(cells[k], nuclei[k], pathClasses[codes[k]],
                    measure(names, values, k)), ids, k))
        return objects
    }

    /** Row k of N rows of values, with one number for each name; NaN is none. */
    private static MeasurementList measure(String[] names, float[] values, int k) {
        MeasurementList measured = MeasurementListFactory.createMeasurementList(
                names.length, MeasurementList.MeasurementListType.FLOAT)
        for (int i = 0; i < names.length; i++)
            measured.put(names[i], values[k * names.length + i])
        measured.close()
        return measured
    }

    /** Gives an object the k-th of N UUIDs, which come as 2 N halves. */
    private static PathObject identify(PathObject pathObject, long[] ids, int k) {
        pathObject.setID(new UUID(ids[2 * k], ids[2 * k + 1]))
        return pathObject
    }
}
